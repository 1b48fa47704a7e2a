"""Memory and its moments: the state equals that of real engines, the peak resident memory."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from harness.fake_state import configuration, engine_state, fake_tensor_state
from seer_scale.parallel.activation_profile import ActivationProfile, BlockProfile, Cost
from seer_scale.performance.shape import regions
from seer_scale.planner import plan
from seer_scale.planner.memory import GIB
from seer_scale.train import build

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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "trunk"),
    [
        # Not ddp, whose reducer wants a result that a group of nobody does not give.
        *[(name, "regnety_debug") for name in ("fsdp", "hsdp", "zero1", "zero2", "zero3")],
        pytest.param("zero2", "regnety_1_6gf", marks=pytest.mark.slow),
        pytest.param("zero3", "regnety_1_6gf", marks=pytest.mark.slow),
    ],
)
def test_state_is_what_the_engine_holds_on_rank_0_of_512(strategy: str, trunk: str) -> None:
    case = (strategy, 512, 8, trunk)
    # DeepSpeed remembers the group that a process first had.
    with get_context("spawn").Pool(1) as pool:
        expected = pool.apply(engine_state, case)
    assert planned_state(*case) == expected


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


@pytest.mark.parametrize(("strategy", "buckets"), [("zero1", 2), ("zero2", 2), ("zero3", 1)])
def test_zeros_buckets_are_whole_on_a_gpu_and_as_full_as_they_get_on_a_cpu(
    strategy: str, buckets: int
) -> None:
    size = 50_000_000 * 4 * buckets
    on_gpu, on_cpu = small(strategy), small(strategy, hardware="cpu")
    # Beside the bucket: one tensor's gradient, or what the last reduction copies.
    assert size <= on_gpu.communication <= size * 1.02
    assert on_cpu.communication < size / 50


def test_a_step_in_the_backward_pass_frees_gradients_under_fsdp_but_not_under_hsdp() -> None:
    fused = "optim.fuse_backward=true"
    assert small("fsdp", fused).gradients < small("fsdp").gradients
    copies = "sharding.shard_size=2"
    assert small("hsdp", copies, fused).gradients == small("hsdp", copies).gradients


def test_units_that_are_not_freed_take_more() -> None:
    kept = small("fsdp", "sharding.reshard_after_forward=false")
    assert kept.gathered > small("fsdp").gathered > 0
    assert small("ddp").gathered == 0


def test_what_zero_3_fetches_ahead_is_there_twice_until_its_last_tensor_is_used() -> None:
    config = configuration("zero3", 1, "regnety_1_6gf")
    model = build.model_of(config, torch.device("meta"))
    cut = sum(p.numel() for p in model.parameters() if p.numel() > 100_000)  # ds_configs/zero3.json
    profile = replace(NO_ACTIVATIONS, stem=Cost(GIB, GIB))  # held until the backward pass ends
    found = plan(config, "cpu", nodes=1, gpus_per_node=8, profile=profile).memory
    assert 0 < cut < 50_000_000  # one bucket
    assert found.gathered == pytest.approx(2 * 4 * cut)


def test_all_gradients_of_ddp_stand_while_activations_are_at_their_most() -> None:
    config = configuration("ddp", 1, "regnety_1_6gf")
    model = build.model_of(config, torch.device("meta"))
    total = sum(p.numel() for p in model.parameters())
    trunk = sum(p.numel() for p in model.trunk.parameters())
    profile = replace(NO_ACTIVATIONS, head=Cost(GIB, GIB))  # the backward pass begins with it

    def activations(world: int) -> float:
        found = plan(config, "cpu", nodes=1, gpus_per_node=world, profile=profile).memory
        assert found.gradients == 4 * total
        return found.activations

    assert activations(2) == GIB  # beside the buckets, which are never freed
    assert activations(1) == GIB - 4 * trunk  # in the room of the trunk's gradients


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


# The batch and the groups of the published run; 37.4 GiB of a GPU are usable.
PUBLISHED = ("train.micro_batch_size=16", "sharding.sync_bn_group_size=0")


@pytest.mark.long
def test_rg10b_fits_496_gpus_of_40_gb_with_its_own_groups() -> None:
    def memory(*more: str) -> Any:
        return plan("seer_rg10b", "a100_40gb", nodes=62, gpus_per_node=8, strategy="fsdp",
                    overrides=(*PUBLISHED, *more))  # fmt: skip

    low, compiled = memory(), memory("train.compile=true")
    assert low.fits
    assert low.memory.total / GIB < 25
    # Its region of nine blocks gathers 13.5 GiB in float32, and autocast would copy them twice.
    assert not compiled.fits
    assert compiled.memory.gathered == pytest.approx(2 * low.memory.gathered, rel=1e-2)


def test_a_weight_that_is_gathered_in_16_bit_is_not_copied_by_autocast() -> None:
    bf16 = ("train.precision=bf16", "model.trunk=regnety_1_6gf")
    low = small("fsdp", *bf16, hardware="cpu")
    wide = small("fsdp", *bf16, "train.compile=true", hardware="cpu")
    # float32 weights, and a copy of 16 bit for each of two resolutions.
    assert wide.activations - low.activations > 0.85 * 2 * 2 * 10.3e6
    assert low.gathered < 0.6 * wide.gathered
