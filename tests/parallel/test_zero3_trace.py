"""DeepSpeed's stage 3 records in which order layers are used, and prefetches by that record."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.jobs import ROOT, arguments, run_job, write_images
from harness.pool import Distributed

ZERO3 = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero3.json")]


def invalidations(argv: list[str]) -> int:
    """How often the record is thrown away in a job, because a layer comes out of order."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    invalidate, count = PartitionedParameterCoordinator._invalidate_trace, 0

    def counted(self: PartitionedParameterCoordinator) -> None:
        nonlocal count
        count += 1
        invalidate(self)

    PartitionedParameterCoordinator._invalidate_trace = counted
    try:
        run_job(argv)
    finally:
        PartitionedParameterCoordinator._invalidate_trace = invalidate
    return count


ONE = ("data.crop_sizes=[32]", "data.crop_counts=[2]", "data.crop_scales=[[0.3,1]]")
TWO = ("data.crop_sizes=[48,32]", "data.crop_counts=[2,2]", "data.crop_scales=[[0.3,1],[0.1,0.3]]")


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        ONE,
        TWO,
        (*TWO, "sharding.activation_checkpointing=full"),
        (*TWO, "train.gradient_accumulation=2"),
    ],
    ids=["one resolution", "two resolutions", "recomputed", "accumulated"],
)
def test_the_record_holds(distributed: Distributed, tmp_path: Path, more: tuple[str, ...]) -> None:
    argv = arguments(write_images(tmp_path / "images"), tmp_path / "run", *ZERO3, "train.steps=6")
    argv = [word for word in argv if not word.startswith("data.crop_")]
    assert distributed(invalidations, 2, [*argv, *more]) == [0, 0]
