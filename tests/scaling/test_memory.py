"""Bytes per rank: the state exactly as engines hold it, the peak as this machine sees it."""

from __future__ import annotations

from multiprocessing import get_context
from typing import Any

import pytest

from seer_scale.parallel.activation_profile import ActivationProfile, BlockProfile, Cost
from seer_scale.scaling import plan
from seer_scale.scaling.memory import GIB
from seer_scale.scaling.shape import regions
from tests.scaling.fake_state import configuration, engine_state, fake_tensor_state
from tests.scaling.measured import measure

NO_ACTIVATIONS = ActivationProfile(
    0, Cost(0, 0), (BlockProfile(Cost(0, 0), Cost(0, 0)),) * 27, Cost(0, 0)
)


def planned_state(strategy: str, world: int, shard_size: int, trunk: str) -> list[int]:
    """Bytes of the plan's parameters, gradients and optimizer."""
    config = configuration(strategy, shard_size, trunk)
    per_node = min(world, 8)
    found = plan(
        config, "cpu", nodes=world // per_node, gpus_per_node=per_node, profile=NO_ACTIVATIONS
    ).memory
    state = [found.parameters, found.gradients, found.optimizer]
    assert all(number == int(number) for number in state)
    return [int(number) for number in state]


@pytest.mark.parametrize(
    ("strategy", "world", "shard_size", "trunk"),
    [
        ("ddp", 1, 1, "regnety_debug"),
        ("fsdp", 512, 1, "regnety_debug"),
        ("fsdp", 6, 1, "regnety_debug"),  # divides no width
        ("hsdp", 512, 8, "regnety_debug"),
        pytest.param("fsdp", 512, 1, "regnety_256gf", marks=pytest.mark.slow),
        pytest.param("hsdp", 512, 8, "regnety_16gf", marks=pytest.mark.slow),
    ],
)
def test_state_is_what_fake_tensors_hold(
    strategy: str, world: int, shard_size: int, trunk: str
) -> None:
    expected = fake_tensor_state(strategy, world, shard_size, trunk)
    assert planned_state(strategy, world, shard_size, trunk) == expected


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"])
def test_state_is_what_the_engine_holds_on_rank_0_of_512(strategy: str) -> None:
    case = (strategy, 512, 8, "regnety_debug")
    # DeepSpeed remembers the group that a process first had.
    with get_context("spawn").Pool(1) as pool:
        expected = pool.apply(engine_state, case)
    assert planned_state(*case) == expected


# ------------------------------------------------------------------------------- the peak

COMMON = (
    *("--recipe", "swav_in1k_regnety_16gf", "run.dir=unused", "data.path=unused"),
    *("tracking.enabled=false", "train.precision=fp32", "sharding.sync_bn_group_size=0"),
    *("data.crop_sizes=[128,64]", "data.crop_counts=[2,4]", "model.head_dims=[512,128]"),
)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
@pytest.mark.parametrize(
    ("trunk", "images"), [("regnety_1_6gf", 8), ("regnety_3_2gf", 8), ("regnety_8gf", 4)]
)
def test_the_peak_is_within_a_tenth_of_resident_memory(
    trunk: str, images: int, strategy: str, mode: str
) -> None:
    more = [
        f"model.trunk={trunk}",
        f"train.micro_batch_size={images}",
        f"sharding.activation_checkpointing={mode}",
    ]
    found = plan(
        COMMON[1],
        "cpu",
        nodes=1,
        gpus_per_node=2,
        strategy=strategy,
        overrides=[*COMMON[2:], *more],
    ).memory
    sharding = (
        ("--deepspeed_config", f"ds_configs/{strategy}.json")
        if strategy.startswith("zero")
        else (f"sharding.strategy={strategy}",)
    )
    assert found.total == pytest.approx(measure(*COMMON, *sharding, *more), rel=0.1)


# ------------------------------------------------------------------------------- its parts


def test_regions_are_the_trainers() -> None:
    assert regions("none", (2, 3)) == ()
    assert regions("full", (2, 3)) == ((0,), (1,), (2,), (3,), (4,))
    assert regions("auto:1", (2, 3), None, frozenset({4, 1})) == ((1,), (4,))
    # Blocks after the last end are one more group; a stage without ends is kept.
    assert regions("groups", (2, 3), ((), (1,))) == ((2,), (3, 4))
    assert regions("groups", (2, 3), ((9,), ())) == ((0, 1),)


def small(strategy: str, *overrides: str, gpus: int = 4, hardware: str = "v100_32gb") -> Any:
    return plan(
        "debug",
        hardware,
        nodes=1,
        gpus_per_node=gpus,
        strategy=strategy,
        overrides=["data.crop_sizes=[128,64]", *overrides],
    ).memory


def test_kinds_sum_to_the_total() -> None:
    for strategy in ("ddp", "fsdp", "zero3"):
        gib = small(strategy).gib()
        assert sum(gib.values()) - gib["total"] == pytest.approx(gib["total"])
        assert min(gib.values()) >= 0


def test_recomputing_takes_less_and_more_images_take_more() -> None:
    full = "sharding.activation_checkpointing=full"
    assert small("ddp", full).activations < small("ddp").activations
    assert small("ddp", "train.micro_batch_size=16").activations > small("ddp").activations


@pytest.mark.parametrize(("strategy", "differs"), [("zero1", 1.0), ("zero2", 1.0), ("zero3", 2.0)])
def test_zeros_buckets_are_whole_on_a_gpu_and_as_full_as_they_get_on_a_cpu(
    strategy: str, differs: float
) -> None:
    bucket = 50_000_000 * 4 * 2  # both, or the one and its copy
    on_gpu, on_cpu = small(strategy), small(strategy, hardware="cpu")
    assert bucket <= on_gpu.communication <= bucket * 1.01
    assert on_cpu.communication < bucket / 100 * differs


def test_units_that_are_not_freed_take_more() -> None:
    kept = small("fsdp", "sharding.reshard_after_forward=false")
    assert kept.gathered > small("fsdp").gathered > 0
    assert small("ddp").gathered == 0


def test_momentum_on_the_host_leaves_one_tensors() -> None:
    there = small("fsdp", "optim.momentum_on_host=true")
    assert 0 < there.optimizer < small("fsdp").optimizer / 2


def test_a_step_in_the_backward_pass_has_one_units_gradients() -> None:
    fused = small("fsdp", "optim.fuse_backward=true")
    assert 0 < fused.gradients < small("fsdp").gradients


def test_published_figures_are_in_gib() -> None:
    found = plan("seer_rg10b", "a100_40gb", nodes=62, gpus_per_node=8, strategy="zero3",
                 profile=NO_ACTIVATIONS)  # fmt: skip
    # 9.63e9 parameters, two float32 values each, over 496 ranks; small tensors stay whole.
    assert found.memory.optimizer == pytest.approx(8 * 9_628_923_288 / 496, rel=1e-3)
    assert found.memory.gib()["optimizer"] == found.memory.optimizer / GIB
