"""Messages, their time, and the terms of a step: small numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from seer_scale.errors import ConfigError
from seer_scale.performance.hardware import FOLDER, names
from seer_scale.planner import Hardware, load_hardware, plan
from seer_scale.planner.communication import Message, Ranks, group_of
from tests.planner.test_memory import NO_ACTIVATIONS

PROFILES = [
    *("a100_40gb", "a100_80gb", "b200_180gb", "cpu", "h100_80gb", "h200_141gb", "v100_32gb"),
]


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


def sent(strategy: str, *overrides: str, nodes: int = 8) -> dict[str, float]:
    return plan(
        "seer_256gf",
        "h100_80gb",
        nodes=nodes,
        gpus_per_node=8,
        strategy=strategy,
        overrides=overrides,
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
    found = sent(strategy)
    unit = WHOLE * 63 / 64
    assert found["gradients"] == pytest.approx(gradients * unit)
    # Stage 3 sends what stays whole only once.
    assert found["sharding"] == pytest.approx(sharding * unit, rel=2e-3)


def test_hsdp_sends_an_eighth_over_the_nodes() -> None:
    found = sent("hsdp")
    assert found["sharding"] == pytest.approx(2 * WHOLE * 7 / 8)
    assert found["gradients"] == pytest.approx(WHOLE * 7 / 8 + 2 * WHOLE / 8 * 7 / 8)


def test_keeping_units_saves_a_gather_and_accumulation_multiplies_it() -> None:
    twice = sent("fsdp")["sharding"]
    assert sent("fsdp", "sharding.reshard_after_forward=false")["sharding"] == twice / 2
    assert sent("fsdp", "train.gradient_accumulation=3")["sharding"] == pytest.approx(3 * twice)
    assert sent("ddp", "train.gradient_accumulation=3")["gradients"] == sent("ddp")["gradients"]


def test_batch_norm_and_sinkhorn() -> None:
    found = sent("ddp", "sharding.sync_bn_group_size=8")
    channels = 32 + 3 * (2 * 746 + 7 * 1492 + 17 * 4103 + 10444) + 746 + 1492 + 4103 + 10444
    norms = 86  # 1 + 3 x 27 + 4
    both = (8 * (2 * channels + norms) + 4 * 2 * channels) * 2  # two resolutions
    assert found["sync_batch_norm"] == pytest.approx(both * 2 * 7 / 8)
    assert found["sinkhorn"] == pytest.approx(4 * 16_000 * 2 * 11 * 2 * 63 / 64)


# ------------------------------------------------------------------------------- its time


def test_terms_sum_to_the_step_and_follow_the_efficiency() -> None:
    slow = plan("seer_256gf", machine(efficiency=0.1), nodes=1, gpus_per_node=8,
                overrides=["sharding.sync_bn_group_size=8"], profile=NO_ACTIVATIONS)  # fmt: skip
    fast = plan("seer_256gf", machine(efficiency=0.2), nodes=1, gpus_per_node=8,
                overrides=["sharding.sync_bn_group_size=8"], profile=NO_ACTIVATIONS)  # fmt: skip
    assert sum(vars(slow.time).values()) == pytest.approx(slow.time.total)
    assert slow.time.forward == pytest.approx(2 * fast.time.forward)
    assert slow.time.forward == pytest.approx(16 * slow.flops.forward / (0.1 * 125e12))
    assert slow.time.recompute == pytest.approx(slow.time.forward, rel=0.01)
    assert slow.mfu == pytest.approx(slow.images_per_second * slow.flops.training / (8 * 125e12))


def test_larger_groups_wait_longer() -> None:
    def waiting(group: int) -> float:
        return plan("seer_256gf", "h100_80gb", nodes=64, gpus_per_node=8, strategy="ddp",
                    overrides=[f"sharding.sync_bn_group_size={group}"],
                    profile=NO_ACTIVATIONS).time.sync_batch_norm  # fmt: skip

    assert waiting(8) < waiting(64) < waiting(0)


def test_seer_takes_what_it_took() -> None:
    found = plan("seer_256gf", "v100_32gb", nodes=64, gpus_per_node=8, strategy="ddp",
                 overrides=["train.micro_batch_size=17"], profile=NO_ACTIVATIONS)  # fmt: skip
    assert found.global_batch == 8704
    assert found.time.total == pytest.approx(6.125, rel=0.01)


# ------------------------------------------------------------------------------- profiles


def test_the_profiles_there_are() -> None:
    assert names() == PROFILES
    for name in PROFILES:
        hardware = load_hardware(name)
        assert hardware.usable_gib > 0
        assert hardware.efficiency_source


def test_an_own_profile(tmp_path: Any) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text((FOLDER / "cpu.yaml").read_text())
    assert load_hardware(str(own)) == load_hardware("cpu")
    own.write_text("name: nothing\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: generation: field required"):
        load_hardware(str(own))


def test_measured_goes_before_nominal() -> None:
    assert machine().intra_node_gb_s.bytes_per_second == 10e9
    assert load_hardware("v100_32gb").intra_node_gb_s.bytes_per_second == 0.8 * 150e9


def test_volta_has_no_bfloat16() -> None:
    with pytest.raises(ConfigError, match="which NVIDIA V100 SXM2, 32 GB does not have: use fp32"):
        load_hardware("v100_32gb").peak("bf16")
    assert load_hardware("v100_32gb").peak("apex-o1") == 125e12
