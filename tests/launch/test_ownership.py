"""One run at a time writes `run.dir`, with real launchers; who comes second is told so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness.jobs import ROOT, arguments, lines, write_images
from seer_scale.checkpoint import CheckpointReader, list_checkpoints
from seer_scale.distributed.ports import free_port

pytestmark = [pytest.mark.launch, pytest.mark.long]

PRETRAIN = str(ROOT / "launch" / "pretrain.py")
PYTHON = [sys.executable, PRETRAIN]


def begin(command: list[str], folder: Path) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(condition: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def steps_of(run_dir: Path) -> list[int]:
    return [line["step"] for line in lines(run_dir)] if (run_dir / "metrics.jsonl").exists() else []


def test_of_two_fresh_starts_at_once_one_runs(tmp_path: Path) -> None:
    images, run_dir = write_images(tmp_path / "images"), tmp_path / "run"
    argv = arguments(images, run_dir, "train.steps=100000")
    both = [begin([*PYTHON, *argv], tmp_path) for _ in range(2)]
    until(lambda: any(one.poll() is not None for one in both))
    second, first = sorted(both, key=lambda one: one.poll() is None)
    assert second.stderr is not None
    assert second.returncode == 1
    (line,) = second.stderr.read().strip().splitlines()
    assert line.startswith(f"error: run.dir={run_dir} is in use by process {first.pid} on ")
    until(lambda: len(steps_of(run_dir)) >= 3)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 75, said
    steps = steps_of(run_dir)
    assert steps == list(range(1, len(steps) + 1))
    assert not (run_dir / ".owner").exists()
    assert CheckpointReader(list_checkpoints(run_dir / "checkpoints")[-1]).verify() is None


@pytest.mark.timeout(600)
def test_ranks_whose_launcher_was_killed_still_own_their_run(tmp_path: Path) -> None:
    """And once they are killed too, the next start takes over and resumes."""
    images, run_dir = write_images(tmp_path / "images"), tmp_path / "run"
    argv = arguments(images, run_dir, "train.steps=100000", "checkpoint.every=3")
    config = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json")]

    def deepspeed(*more: str) -> subprocess.Popen[str]:
        port = ["--master_port", str(free_port())]
        command = [
            "deepspeed",
            "--quiet",
            "--num_gpus",
            "2",
            *port,
            PRETRAIN,
            *argv,
            *config,
            *more,
        ]
        return begin(command, tmp_path)

    launcher = deepspeed()
    until(lambda: list_checkpoints(run_dir / "checkpoints"))
    family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    launchers = [process for process in family if "RANK" not in process.environ()]
    ranks = {p.environ()["RANK"]: p for p in family if p.ppid() == launchers[-1].pid}
    assert sorted(ranks) == ["0", "1"]
    try:
        for process in launchers:
            process.kill()
        launcher.wait()
        second = deepspeed("--resume", "auto")
        _, said = second.communicate(timeout=240)
        assert second.returncode == 1
        (line,) = [line for line in said.splitlines() if "error: " in line]
        assert line.startswith(
            f"error: run.dir={run_dir} is in use by process {ranks['0'].pid} on "
        ), said
        assert "Traceback" not in said
        # The first run goes on as if nothing had been.
        reached = steps_of(run_dir)[-1]
        until(lambda: steps_of(run_dir)[-1] > reached + 3)
        assert not list((run_dir / "checkpoints").glob("superseded_*"))
    finally:
        for process in ranks.values():
            process.kill()
    until(lambda: not any(process.is_running() for process in ranks.values()))
    saved = int(list_checkpoints(run_dir / "checkpoints")[-1].name.removeprefix("step_"))
    more = arguments(images, run_dir, f"train.steps={saved + 2}", "checkpoint.every=3")
    third = begin([*PYTHON, *more, "--resume", "auto"], tmp_path)
    _, said = third.communicate(timeout=240)
    assert third.returncode == 0, said
    assert steps_of(run_dir) == list(range(1, saved + 3))
