"""Whole runs that lose a checkpoint, a disk or ranks, and go on."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.jobs import ROOT, arguments, lines, losses, run_job, write_images
from harness.pool import Distributed
from seer_scale.checkpoint import CheckpointReader, list_checkpoints
from seer_scale.distributed.ports import free_port
from seer_scale.errors import LOST_RANK_STATUS, CheckpointError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.long
def test_a_damaged_newest_checkpoint_is_passed_over(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(images, run_dir, "run.log_samples=true", "checkpoint.every=3")
    distributed(run_job, 2, argv)
    whole, samples = losses(run_dir), lines(run_dir, "samples.jsonl")
    newest = run_dir / "checkpoints" / "step_00000008"
    assert all("checkpoint_stall" in line for line in lines(run_dir) if line["step"] in (4, 7))
    path = newest / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert distributed(run_job, 2, [*argv, "--resume", "auto"]) == [8, 8]
    assert losses(run_dir) == whole
    assert lines(run_dir, "samples.jsonl") == samples
    # the damaged one made room for a good one, and can still be looked at
    assert CheckpointReader(newest).verify() is None
    assert (run_dir / "checkpoints" / "superseded_step_00000008").is_dir()


@pytest.mark.long
def test_a_queue_moves_to_another_number_of_ranks(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    one, two, moved = tmp_path / "one", tmp_path / "two", tmp_path / "moved"
    common = ["objective.queue_length=16", "optim.base_lr=0.05", "checkpoint.keep=9"]
    distributed(run_job, 2, arguments(images, two, "train.micro_batch_size=4", *common))
    alone = ["train.micro_batch_size=8", *common]
    distributed(run_job, 1, arguments(images, one, *alone))
    step_4 = str(two / "checkpoints" / "step_00000004")
    distributed(run_job, 1, arguments(images, moved, *alone, "--resume", step_4))
    # float32 sums in another order, through eight steps of a BatchNorm network
    assert losses(moved) == pytest.approx(losses(one)[4:], rel=1e-4)
    assert losses(moved) == pytest.approx(losses(two)[4:], rel=1e-4)


@pytest.mark.long
def test_another_precision_and_strategy_go_on_from_the_same_weights(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    half, full = tmp_path / "half", tmp_path / "full"
    common = ["optim.base_lr=0.05", "checkpoint.keep=9"]
    distributed(run_job, 2, arguments(images, half, "train.precision=bf16", *common))
    step_4 = half / "checkpoints" / "step_00000004"
    more = [*common, "sharding.strategy=fsdp", "train.steps=5", "--resume", str(step_4)]
    distributed(run_job, 2, arguments(images, full, *more))
    # One step from the same masters: they differ by 8 bits of mantissa, in the forward alone. That
    # is below 1 % where bf16 is emulated, and 1.03 % on a processor that multiplies it (AMX).
    assert losses(full) == pytest.approx(losses(half)[4:5], rel=0.02)
    assert losses(full) != losses(half)[4:5]
    # The same weights exactly: float32 under another strategy makes the same step of them.
    again = tmp_path / "again"
    more[2] = "sharding.strategy=ddp"
    distributed(run_job, 2, arguments(images, again, *more))
    assert losses(full) == pytest.approx(losses(again), rel=1e-5)


def run_with_small_files(argv: list[str], bytes_: int) -> str:
    """A run on a disk that takes no file larger than that; what the run says at its end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        run_job(argv)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "finished"


@pytest.mark.long
def test_a_run_outlives_a_disk_that_does_not_write(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(images, run_dir, "checkpoint.every=3")
    distributed(run_job, 1, [*argv, "train.steps=3"])
    more = [*argv, "train.steps=8", "--resume", "auto"]
    (said,) = distributed(run_with_small_files, 1, more, 300_000)
    assert "the last checkpoint, of step 8, was not written (rank 0 could not write" in said
    assert [line["step"] for line in lines(run_dir)] == list(range(1, 9))  # it trained on
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step_00000003"]
    assert distributed(run_job, 1, more) == [8]


@pytest.mark.slow
@pytest.mark.launch
def test_a_rank_that_stands_still_is_named(images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(free_port()), str(ROOT / "launch" / "pretrain.py")),
        *arguments(images, run_dir, "train.steps=100000", "run.hang_minutes=0.3"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while not (run_dir / "metrics.jsonl").exists() or len(lines(run_dir)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in children:
            if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(int(pid), signal.SIGSTOP)
        _, errors = process.communicate(timeout=200)
    assert re.search(r"error: rank 0 has waited \d+ s in step \d+", errors), errors
    assert re.search(r"missing: rank 1 on \S+ \(silent since step", errors), errors
    assert f"exitcode  : {LOST_RANK_STATUS}" in errors
