"""Resumed runs: bit for bit on the same ranks, on another strategy, or refused."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from harness.jobs import arguments, lines, losses, run_job
from harness.pool import Distributed
from seer_scale.checkpoint import rank_files
from seer_scale.errors import CheckpointError, UserError
from seer_scale.storage.tensor_file import stream_tensors
from tests.train.runs import ZERO, assert_same_tensors, refused


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (1, ["objective.queue_length=8", "data.workers=1"]),
        pytest.param(2, ["train.gradient_accumulation=2"], marks=pytest.mark.slow),
        pytest.param(2, ZERO["zero2"], marks=pytest.mark.slow),
        pytest.param(
            2,
            [*ZERO["zero3"], "sharding.activation_checkpointing=full"],
            marks=pytest.mark.long,
        ),
        pytest.param(
            2, ["sharding.strategy=fsdp", "train.precision=amp-o1"], marks=pytest.mark.long
        ),
    ],
    ids=["alone, queue", "ddp, accumulation", "zero2", "zero3, recompute", "fsdp, float16"],
)
def test_resuming_equals_not_having_stopped_bit_for_bit(
    distributed: Distributed, images: Path, tmp_path: Path, world_size: int, more: list[str]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    common = ["run.log_samples=true", "checkpoint.every=3", "checkpoint.keep=9", *more]
    distributed(run_job, world_size, arguments(images, whole, *common))
    middle = whole / "checkpoints" / "step_00000003"
    shutil.copytree(middle, resumed / "checkpoints" / middle.name)
    for name in ("metrics.jsonl", "samples.jsonl"):  # as a run killed after step 8 leaves them
        shutil.copy(whole / name, resumed / name)
    argv = arguments(images, resumed, *common, "--resume", "auto")
    assert distributed(run_job, world_size, argv) == [8] * world_size
    assert losses(resumed) == losses(whole)
    assert [line.get("loss_scale") for line in lines(resumed)] == [
        line.get("loss_scale") for line in lines(whole)
    ]
    assert lines(resumed, "samples.jsonl") == lines(whole, "samples.jsonl")
    for name in ("step_00000006", "step_00000008"):
        assert_same_tensors(whole / "checkpoints" / name, resumed / "checkpoints" / name)


def run_with_late_writes(argv: list[str]) -> int:
    """Runs a job whose saves are written only after the training has done more steps."""

    def late(*args: Any) -> Any:
        time.sleep(3)
        return stream_tensors(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_files, "stream_tensors", late)
        return run_job(argv)


@pytest.mark.long
@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (1, []),
        pytest.param(1, ["optim.fuse_backward=true"], marks=pytest.mark.long),
        pytest.param(2, ZERO["zero2"], marks=pytest.mark.long),
        pytest.param(2, [*ZERO["zero3"], "train.gradient_accumulation=2"], marks=pytest.mark.slow),
        pytest.param(2, ["sharding.strategy=fsdp"], marks=pytest.mark.slow),
    ],
    ids=["ddp", "fused", "zero2", "zero3, accumulation", "fsdp"],
)
def test_what_is_saved_is_the_step_s_however_late_it_is_written(
    distributed: Distributed, images: Path, tmp_path: Path, world_size: int, more: list[str]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    common = ["checkpoint.every=3", "checkpoint.keep=9", "train.steps=6", *more]
    distributed(run_with_late_writes, world_size, arguments(images, whole, *common))
    middle = str(whole / "checkpoints" / "step_00000003")
    argv = arguments(images, resumed, *common, "--resume", middle)
    distributed(run_job, world_size, argv)
    assert losses(resumed) == losses(whole)[3:]
    last = Path("checkpoints") / "step_00000006"
    assert_same_tensors(whole / last, resumed / last)


@pytest.mark.long
def test_a_checkpoint_of_one_strategy_is_read_by_another(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    common = ["checkpoint.every=4", "optim.base_lr=0.05", "checkpoint.keep=9"]
    sharded = [*common, *ZERO["zero3"]]
    distributed(run_job, 2, arguments(images, whole, "train.micro_batch_size=4", *sharded))
    source = str(whole / "checkpoints" / "step_00000004")
    alone = [*common, "train.micro_batch_size=8", "--resume", source]
    distributed(run_job, 1, arguments(images, moved, *alone))
    assert losses(moved) == pytest.approx(losses(whole)[4:], rel=1e-4)


def test_another_model_s_checkpoint_is_refused(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    distributed(run_job, 1, arguments(images, tmp_path / "run"))
    argv = arguments(images, tmp_path / "run", "model.head_dims=[24, 16]", "--resume", "auto")
    (sentence,) = distributed(refused, 1, argv, CheckpointError)
    assert "another model" in sentence
    assert "head.layers.0.weight is [32" in sentence or "instead of [24" in sentence
    (sentence,) = distributed(refused, 1, arguments(images, tmp_path / "run"), UserError)
    assert "already holds a run" in sentence
    assert len(lines(tmp_path / "run")) == 8  # nothing was lost


def test_a_run_is_not_overwritten(distributed: Distributed, images: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    distributed(run_job, 1, arguments(images, first))
    distributed(run_job, 1, arguments(images, second))
    elsewhere = str(first / "checkpoints" / "step_00000004")
    shutil.rmtree(second / "checkpoints" / "step_00000008")
    for more in (["--resume", elsewhere], []):
        (sentence,) = distributed(refused, 1, arguments(images, second, *more), UserError)
        assert f"run.dir={second} already holds a run (step_00000004)" in sentence
    shutil.rmtree(second / "checkpoints")  # killed before its first checkpoint
    (sentence,) = distributed(refused, 1, arguments(images, second), UserError)
    assert "no checkpoint yet" in sentence
    assert len(lines(second)) == 8
