"""What ranks say of their GPUs before they use them: one warning a node, whatever the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
import sys, torch
from seer_scale.performance import gpu_start
torch.cuda.is_available = lambda: CUDA
gpu_start.start_gpu = lambda: "its GPU is odd"
from seer_scale.commands.COMMAND import main
main(sys.argv[1:])
"""


TRAIN = ["--recipe", "debug", "data.path=no"]  # no images are there
DRY = [*TRAIN, "run.dir=no", "--dry-run"]


def said_by(command: str, arguments: list[str], *, cuda: bool) -> str:
    """Standard error of a command whose GPU is odd."""
    return subprocess.run(
        [
            *(sys.executable, "-c"),
            PROGRAM.replace("COMMAND", command).replace("CUDA", str(cuda)),
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    ).stderr


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("pretrain", DRY), ("evaluate", ["knn", "--model", "no", "--data", "no"])],
)
def test_trainings_and_evaluations_begin_with_it(command: str, arguments: list[str]) -> None:
    assert "warning: its GPU is odd\n" in said_by(command, arguments, cuda=False)


def test_a_training_uses_a_gpu_after_every_check_and_a_dry_run_does_not(tmp_path: Path) -> None:
    assert "odd" not in said_by("pretrain", DRY, cuda=True)
    run = [*TRAIN, f"run.dir={tmp_path}"]
    assert "warning: its GPU is odd\n" in said_by("pretrain", run, cuda=True)
    refused = said_by("pretrain", [*run, "objective.temperature=-1"], cuda=True)
    assert "objective.temperature" in refused
    assert "odd" not in refused
