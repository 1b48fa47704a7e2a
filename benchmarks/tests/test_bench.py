"""The sections of `make bench` run, and the contenders of a section train the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import bench_gpu, peers
from benchmarks.train_step import arguments, our_step
from harness.engines import configuration
from harness.jobs import ROOT
from harness.pool import Distributed
from seer_scale.models import build_model, initialise


def _losses() -> tuple[list[float], list[float]]:
    model = build_model(
        "regnety_debug", head_dims=[512, 128], head_batch_norm=False, prototypes=3000
    )
    initialise(model, 0)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(n, 3, size, size, generator=generator) for n, size in ((4, 64), (8, 32))]
    ours = our_step(configuration(*arguments("regnety_debug", 2)))
    plain, _ = peers.plain_step(model, "regnety_debug", crops=6)
    assert dist.get_world_size() == 1
    return [float(ours(images)) for _ in range(4)], [float(plain(images)) for _ in range(4)]


def test_the_plain_loop_trains_as_this_project_does(distributed: Distributed) -> None:
    # Twelve images and BatchNorm: rounding grows from step to step, the first loss has little.
    ((ours, plain),) = distributed(_losses, 1)
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert ours == pytest.approx(plain, rel=1e-3)
    assert len(set(ours)) == 4


@pytest.mark.slow
def test_the_gpu_bench_runs_and_ends_on_a_cpu() -> None:
    command = [sys.executable, "benchmarks/bench_gpu.py", "--device", "cpu", "--budget", "110"]
    done = subprocess.run(
        [*command, "--trunk", "regnety_debug", "--batch", "2"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 1 + 16 + 1
    assert "plain torchvision loop again" in rows[-1]
    assert any("align 8" in row and "not measured" not in row for row in rows)
    assert all("not measured" in row for row in rows if "compile" in row)  # they need longer


HANGS = """
import faulthandler, pathlib, sys, time
from benchmarks import bench_gpu, record
later, asked = faulthandler.dump_traceback_later, []
faulthandler.dump_traceback_later = lambda *seconds, **more: asked.append((seconds, more))
record.RESULTS = pathlib.Path(sys.argv.pop())
bench_gpu.DOCUMENT = record.RESULTS / "performance.md"
def our_step(config, device):
    if config.sharding.activation_checkpointing != "none":
        later(0.1, exit=asked == [((470.0,), {"exit": True})])  # not in eight minutes
        time.sleep(60)
    if config.model.align_channels == 1:
        raise RuntimeError("no kernel | here\\nand more")
    return plain_step(config, device)
def plain_step(config, device):
    return lambda images: None
bench_gpu.our_step, bench_gpu.plain_step = our_step, plain_step
bench_gpu.main()
"""


def test_a_row_that_fails_or_hangs_leaves_the_other_rows(tmp_path: Path) -> None:
    (tmp_path / "performance.md").write_text("<!-- bench gpu -->\n<!-- /bench gpu -->\n")
    done = subprocess.run(
        [
            *(sys.executable, "-c", HANGS, "--device", "cpu", "--batch", "1"),
            *("--trunk", "regnety_debug", "--write", str(tmp_path)),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Timeout (0:00:00.1" in done.stderr  # and where it hung
    assert "in our_step" in done.stderr
    assert len(done.stdout.splitlines()) == 5
    (path,) = tmp_path.glob("bench_gpu_*.json")
    said = [row["ms an image"] for row in json.loads(path.read_text())["rows"]]
    assert [type(cell) for cell in said[:5]] == [float, float, str, float, str]
    assert said[2] == said[4] == "failed: RuntimeError: no kernel / here"
    assert said[5:] == ["not measured"] * 13
    assert "failed: RuntimeError: no kernel / here |" in (tmp_path / "performance.md").read_text()


@pytest.mark.parametrize(
    ("left", "taken", "choice", "expected"),
    [
        (1.0, [], None, True),  # the first
        (31.0, [30.0, 50.0], None, True),
        (29.0, [30.0, 50.0], None, False),
        (81.0, [30.0, 50.0], {"compile": False}, True),
        (79.0, [30.0, 50.0], {"compile": False}, False),
        (149.0, [30.0, 50.0], {"compile": True}, False),
        (151.0, [30.0, 50.0], {"compile": True}, True),
        (171.0, [30.0, 140.0], {"compile": True}, True),
        (169.0, [30.0, 140.0], {"compile": True}, False),
    ],
)
def test_a_row_starts_if_it_and_the_last_fit(
    left: float, taken: list[float], choice: dict[str, Any] | None, expected: bool
) -> None:
    assert bench_gpu.fits(left, taken, choice) is expected


def test_a_mistyped_section_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench.py"), "stepp"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no section 'stepp'" in done.stderr
