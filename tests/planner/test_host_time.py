"""The host's seconds of a step: by hand, in a plan, and against measured processor seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from harness.host_time import host_cost
from seer_scale.planner import plan
from seer_scale.planner.host_time import host_seconds
from seer_scale.planner.planned import Plan

ONE_RESOLUTION = ("data.crop_sizes=[32]", "data.crop_counts=[2]")


def planned(
    strategy: str,
    *more: str,
    trunk: str = "regnety_debug",
    group: int = 8,
    batch: int = 512,
    hardware: str = "h100_80gb",
    nodes: int = 1,
) -> Plan:
    argv = [f"sharding.sync_bn_group_size={group}", f"train.global_batch={batch}", *more]
    return plan(
        "swav_in1k_regnety_16gf", hardware, nodes=nodes, gpus_per_node=8, strategy=strategy,
        overrides=[f"model.trunk={trunk}", *argv],
    )  # fmt: skip


def seconds(found: Plan, **changes: Any) -> float:
    batch = replace(found.batch, **{"gradient_accumulation": 1, **changes})
    return host_seconds(found.shape, found.layout, batch, found.recomputed)


def test_layers_tensors_and_units_by_hand() -> None:
    """22 BatchNorms: the stem's, three in each of 6 blocks, three projections'. 95 tensors."""
    ddp = planned("ddp", *ONE_RESOLUTION)
    assert [len(norms) for norms in ddp.shape.norms] == [22, 0]
    assert len(ddp.shape.tensors) == 95
    assert seconds(ddp) == pytest.approx(22 * 0.9e-3 + 95 * 0.1e-3)
    # A second micro-batch updates nothing.
    assert seconds(ddp, gradient_accumulation=3) == pytest.approx(3 * 22 * 0.9e-3 + 95 * 0.1e-3)
    alone = planned("ddp", *ONE_RESOLUTION, group=1)
    assert seconds(alone) == pytest.approx(22 * 0.5e-3 + 95 * 0.1e-3)
    two = planned("ddp", "data.crop_sizes=[64,32]", "data.crop_counts=[2,4]")
    assert seconds(two) == pytest.approx(2 * 22 * 0.9e-3 + 95 * 0.1e-3)
    again = planned("ddp", *ONE_RESOLUTION, "sharding.activation_checkpointing=full")
    assert seconds(again) == pytest.approx(22 * 1.3e-3 + 95 * 0.1e-3)
    # The stem, six blocks, the head and the prototypes; 16 ranks' part of each of them.
    fsdp = planned("fsdp", *ONE_RESOLUTION, nodes=2)
    assert seconds(fsdp) == pytest.approx(seconds(ddp) + 9 * (3.3e-3 + 16 * 8e-6))
    assert seconds(planned("zero2", *ONE_RESOLUTION)) == pytest.approx(seconds(ddp) + 95 * 0.2e-3)
    assert seconds(planned("zero3", *ONE_RESOLUTION)) == pytest.approx(seconds(ddp) + 95 * 0.7e-3)
    assert seconds(planned("zero0", *ONE_RESOLUTION)) == pytest.approx(seconds(ddp))
    assert seconds(ddp, compiled=True) == 0


def test_a_step_takes_as_long_as_the_slower_of_gpu_and_host() -> None:
    small = planned("fsdp", "train.micro_batch_size=64")
    assert small.batch.gradient_accumulation == 1
    assert small.time.host > 0
    assert small.time.total == pytest.approx(seconds(small))
    large = planned("fsdp", "train.micro_batch_size=64", trunk="regnety_128gf")
    assert large.time.host == 0
    assert large.time.total > seconds(large)
    assert planned("ddp", "train.precision=fp32", hardware="cpu").time.host == 0


def test_more_images_a_micro_batch_are_faster_where_the_host_is_slow() -> None:
    few, many = (planned("ddp", f"train.micro_batch_size={size}") for size in (8, 64))
    assert few.global_batch == many.global_batch
    assert many.images_per_second > 3 * few.images_per_second


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero2", "zero3"])
def test_the_seconds_are_those_that_a_processor_takes(strategy: str) -> None:
    """Within a factor of three: processors differ by two, and this one may be shared."""
    cost = host_cost(strategy, 64, "regnety_debug")
    found = planned(strategy, *ONE_RESOLUTION, "train.precision=fp32", nodes=8)
    measured = cost.forward + cost.backward + cost.step
    assert measured / 3 < seconds(found) < 3 * measured
