"""Messages of a step: their bytes and seconds, against small numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from seer_scale.performance.hardware import Hardware, load_hardware
from seer_scale.planner import plan
from seer_scale.planner.communication import Message, Ranks, group_of, messages
from seer_scale.planner.job import Batch, Layout, Zero
from seer_scale.planner.model import Model, shape_of
from tests.planner.test_memory import NO_ACTIVATIONS


def machine(**changes: Any) -> Hardware:
    """A machine of round numbers: 10 and 1 GB/s, 1 and 10 microseconds."""
    values = load_hardware("v100_32gb").model_dump()
    values |= {
        "intra_node_gb_s": {"nominal": 99, "measured": 10},
        "inter_node_gb_s": {"nominal": 99, "measured": 1},
        "latency_us": {"intra": 1, "inter": 10},
        **changes,
    }
    return Hardware.model_validate(values)


def message(op: Any, ranks: Ranks, size: float = 8e9, count: int = 1) -> Message:
    return Message("gradients", op, size, count, ranks, "waiting")


def test_a_ring_within_a_node() -> None:
    gather = message("all_gather", Ranks(4, 1))
    assert gather.sent == 6e9  # 3 quarters
    assert gather.seconds(machine()) == pytest.approx(0.6 + 3e-6)
    assert message("all_reduce", Ranks(4, 1)).seconds(machine()) == pytest.approx(1.2 + 6e-6)


def test_a_ring_over_nodes_uses_all_links_of_a_node() -> None:
    gather = message("all_gather", Ranks(16, 4))  # four links of 1 GB/s a node
    assert gather.seconds(machine()) == pytest.approx(7.5 / 4 + (12 * 1 + 4 * 10) * 1e-6)
    alone = message("all_gather", Ranks(4, 4))
    assert alone.seconds(machine()) == pytest.approx(6 + 40e-6)


def test_a_tree_is_better_for_small_sums_of_many() -> None:
    small = message("all_reduce", Ranks(1024, 128), size=8)
    assert small.seconds(machine()) < 2 * (7 + 7 * 10) * 1e-6 + 1e-6
    assert message("all_gather", Ranks(1024, 128), size=8).seconds(machine()) > 1e-3


def test_one_rank_has_nobody_to_wait_for() -> None:
    assert message("all_reduce", Ranks(1, 1)).seconds(machine()) == 0
    assert group_of(12, 8) == Ranks(12, 2)


# ------------------------------------------------------------------------------- a step's bytes

WHOLE = 4 * 1_431_032_042
LARGEST_BLOCK = 251_367_218


def sent(strategy: str, *overrides: str, nodes: int = 8, accumulation: int = 1) -> dict[str, float]:
    return plan(
        "seer_256gf",
        "h100_80gb",
        nodes=nodes,
        gpus_per_node=8,
        strategy=strategy,
        overrides=[*overrides, f"train.gradient_accumulation={accumulation}"],
        profile=NO_ACTIVATIONS,
    ).bytes_per_step


@pytest.mark.parametrize(
    ("strategy", "sharding", "gradients"),
    [
        ("ddp", 0, 2),
        ("zero0", 0, 2),
        ("zero1", 1, 2),
        ("zero2", 1, 2),
        ("zero3", 2, 1),
        ("fsdp", 2, 1),
    ],
)
def test_how_often_the_model_travels(strategy: str, sharding: float, gradients: float) -> None:
    found = sent(strategy, "train.precision=fp32")
    unit = WHOLE * 63 / 64
    assert found["gradients"] == pytest.approx(gradients * unit)
    # Stage 3 sends what stays whole only once, and keeps its last block for the backward pass.
    kept = LARGEST_BLOCK / (WHOLE / 4) if strategy == "zero3" else 0
    assert found["sharding"] == pytest.approx((sharding - kept) * unit, rel=2e-3)


# Of BatchNorm (a weight and a bias for each channel) and of the prototypes.
IN_FLOAT32 = 4 * (2 * 293_210 + 16_000 * 256)


@pytest.mark.parametrize("precision", ["bf16", "amp-o1"])
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_what_runs_in_16_bit_is_gathered_in_16_bit(strategy: str, precision: str) -> None:
    found = sent(strategy, f"train.precision={precision}")
    half = (WHOLE - IN_FLOAT32) / 2 + IN_FLOAT32
    # Stage 3 sends what stays whole only once, and keeps its last block for the backward pass.
    times = 2 - LARGEST_BLOCK / (WHOLE / 4) if strategy == "zero3" else 2
    rel = 4e-3 if strategy == "zero3" else 1e-9
    assert found["sharding"] == pytest.approx(times * half * 63 / 64, rel=rel)
    assert found["gradients"] == pytest.approx(WHOLE * 63 / 64)


@pytest.mark.parametrize(("sent_low", "gathers"), [(4, 1), (2, 2)])
def test_what_stage_3_keeps_whole_is_gathered_once_for_each_type(
    sent_low: int, gathers: int
) -> None:
    shape = shape_of(Model("regnety_debug", (32, 16), False, 16), 0)
    zero = replace(Zero.read({}), stage=3, persistent=10**9)
    layout = Layout("zero", 8, 8, 64, 0, True, 1, zero, sent_low=sent_low)
    batch = Batch(4, 1, (64, 32), (2, 4), "bf16")
    found = messages(shape, layout, batch, prototypes=16, sinkhorn=None)
    (kept,) = [m for m in found if m.kind == "sharding" and m.size]
    low = sum(size for size, is_low in zip(shape.tensors, shape.low_tensors, strict=True) if is_low)
    assert 0.9 < low / shape.total < 1
    assert kept.count * kept.size == sent_low * low + 4 * (shape.total - low)
    assert (kept.count, kept.when) == (gathers, "waiting")


def test_a_compiled_run_gathers_float32() -> None:
    compiled = sent("fsdp", "train.precision=bf16", "train.compile=true")
    assert compiled == sent("fsdp", "train.precision=fp32")


def test_hsdp_sends_an_eighth_over_the_nodes() -> None:
    found = sent("hsdp", "train.precision=fp32")
    assert found["sharding"] == pytest.approx(2 * WHOLE * 7 / 8)
    assert found["gradients"] == pytest.approx(WHOLE * 7 / 8 + 2 * WHOLE / 8 * 7 / 8)


def test_hsdp_shares_norms_among_the_ranks_of_a_copy_and_gradients_among_copies() -> None:
    model = Model("regnety_debug", (32, 16), False, 16)
    shape = shape_of(model, 0)
    zero = Zero.read({})
    layout = Layout("hsdp", 8, 8, 16, 0, True, 1, zero)  # four copies on two nodes each
    batch = Batch(4, 1, (64, 32), (2, 4), "fp32")
    found = messages(shape, layout, batch, prototypes=16, sinkhorn=None)
    assert {m.ranks for m in found if m.kind == "optimizer"} == {Ranks(16, 2)}
    assert {m.ranks for m in found if m.kind == "sharding"} == {Ranks(16, 2)}
    copies = [m.ranks for m in found if m.kind == "gradients" and m.op == "all_reduce"]
    assert copies == [Ranks(4, 4)]  # a rank of each copy, none of them on one node


def test_keeping_units_saves_a_gather_and_accumulation_multiplies_it() -> None:
    twice = sent("fsdp")["sharding"]
    assert sent("fsdp", "sharding.reshard_after_forward=false")["sharding"] == twice / 2
    assert sent("fsdp", accumulation=3)["sharding"] == pytest.approx(3 * twice)
    assert sent("ddp", accumulation=3)["gradients"] == sent("ddp")["gradients"]


def test_batch_norm_and_sinkhorn() -> None:
    channels = 32 + 3 * (2 * 746 + 7 * 1492 + 17 * 4103 + 10444) + 746 + 1492 + 4103 + 10444
    norms = 86  # 1 + 3 x 27 + 4
    backward = 4 * 2 * channels * 2  # two sums in float32, two resolutions
    for group, forward in {
        8: 8 * 4 * (2 * channels + norms) * 2 * 7 / 8,  # gathered: each rank's row in float32
        16: 16 * 4 * (2 * channels + norms) * 2 * 15 / 16,
        32: 8 * (2 * channels + 2 * norms) * 2 * 2 * 31 / 32,  # summed in float64
    }.items():
        found = sent("ddp", f"sharding.sync_bn_group_size={group}", nodes=16)
        once = 2 * (group - 1) / group
        assert found["sync_batch_norm"] == pytest.approx(forward + backward * once), group
    found = sent("ddp")
    assert found["sinkhorn"] == pytest.approx(4 * 16_000 * 2 * 11 * 2 * 63 / 64)
