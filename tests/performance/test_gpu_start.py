"""What ranks say of their GPUs before they use them: one warning a node, whatever the command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from harness.jobs import ROOT
from seer_scale.performance import gpu_start

OLD, FIXED = "the driver is too old", "the driver cannot extend segments"


@pytest.mark.parametrize(
    ("unused", "cuda", "rank", "said"),
    [
        (OLD, False, 0, OLD),
        (OLD, False, 1, None),
        (None, True, 0, f"{FIXED} of GPU 0"),
        (None, True, 3, None),
        (None, False, 0, None),
    ],
)
def test_the_first_rank_of_a_node_warns(
    monkeypatch: pytest.MonkeyPatch, unused: str | None, cuda: bool, rank: int, said: str | None
) -> None:
    tried: list[int] = []

    def undo(gpu: int) -> str:
        tried.append(gpu)
        return f"{FIXED} of GPU {gpu}"

    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(gpu_start, "unused_gpus", lambda: unused)
    monkeypatch.setattr(gpu_start, "undo_if_unsupported", undo)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert gpu_start.start_gpu() == said
    assert tried == ([rank] if cuda else [])  # every rank tries its own


PROGRAM = """
import sys
from seer_scale.performance import gpu_start
gpu_start.start_gpu = lambda: "its GPU is odd"
from seer_scale.commands.COMMAND import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("pretrain", ["--recipe", "debug", "data.path=no", "run.dir=no", "--dry-run"]),
        ("evaluate", ["knn", "--model", "no", "--data", "no"]),
    ],
)
def test_trainings_and_evaluations_begin_with_it(command: str, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("COMMAND", command), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert "warning: its GPU is odd\n" in done.stderr
