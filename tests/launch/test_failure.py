"""One rank that raises takes the others down: its own traceback first, no hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.jobs import ROOT, arguments, write_images
from seer_scale.distributed.ports import free_port

pytestmark = pytest.mark.launch

SECONDS = 30  # from the failure to the end of the launcher

# An installed objective whose rank 1 raises in its third step; rank 0 then waits for it in a
# collective, or where no connection tells it that nobody will come.
PLUGIN = """
import os, time
from seer_scale.objectives import SwAV
from seer_scale.distributed import rank

class Fragile(SwAV):
    def __init__(self, *, crops: int, asleep: bool) -> None:
        super().__init__(crops=crops)
        self.asleep, self.calls = asleep, 0

    def __call__(self, embeddings, scores):
        self.calls += 1
        if self.calls == 3 and rank() == 1:
            with open(os.environ["FAILED_AT"], "w") as file:
                file.write(str(time.time()))
            raise ArithmeticError("the third step is one too many")
        if self.calls == 3 and self.asleep:
            time.sleep(600)
        return super().__call__(embeddings, scores)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "asleep"),
    [("torchrun", "true"), pytest.param("deepspeed", "false", marks=pytest.mark.slow)],
)
def test_a_rank_that_raises_takes_the_others_down(
    tmp_path: Path, launcher: str, asleep: str
) -> None:
    (tmp_path / "fragile.py").write_text(PLUGIN)
    metadata = tmp_path / "fragile-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[seer_scale.objectives]\nfragile=fragile:Fragile\n")
    count = {"torchrun": "--nproc-per-node", "deepspeed": "--num_gpus"}[launcher]
    port = {"torchrun": "--master-port", "deepspeed": "--master_port"}[launcher]
    command = [
        *(launcher, count, "2", port, str(free_port()), str(ROOT / "launch" / "pretrain.py")),
        *arguments(write_images(tmp_path / "images"), tmp_path / "run", "objective.name=fragile"),
        f"objective.asleep={asleep}",
    ]
    failed_at = tmp_path / "failed_at"
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{tmp_path}",
            "FAILED_AT": str(failed_at),
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode != 0
    assert time.time() - float(failed_at.read_text()) < SECONDS, done.stderr
    first = done.stderr.index("Traceback")
    end = done.stderr.index("ArithmeticError: the third step is one too many")
    # Rank 1's whole traceback, and no other before it or in it.
    assert "File" in done.stderr[first:end]
    assert "Traceback" not in done.stderr[first + 1 : end]
