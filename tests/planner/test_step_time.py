"""The terms of a step's time, against small numbers computed by hand and SEER's published step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seer_scale.models import TRUNKS, build_trunk
from seer_scale.performance.flops import Flops
from seer_scale.planner import plan
from seer_scale.planner.communication import Message, Ranks
from seer_scale.planner.job import Batch
from seer_scale.planner.step_time import StepTime, step_time, traffic
from tests.planner.test_communication import machine
from tests.planner.test_memory import NO_ACTIVATIONS


def test_terms_sum_to_the_step_and_follow_the_efficiency() -> None:
    one = ["sharding.sync_bn_group_size=8", "train.gradient_accumulation=1"]
    slow = plan("seer_256gf", machine(efficiency=0.1), nodes=1, gpus_per_node=8,
                overrides=one, profile=NO_ACTIVATIONS)  # fmt: skip
    fast = plan("seer_256gf", machine(efficiency=0.2), nodes=1, gpus_per_node=8,
                overrides=one, profile=NO_ACTIVATIONS)  # fmt: skip
    assert sum(vars(slow.time).values()) == pytest.approx(slow.time.total)
    assert slow.time.forward == pytest.approx(2 * fast.time.forward)
    assert slow.time.forward == pytest.approx(16 * slow.flops.forward / (0.1 * 125e12))
    assert slow.time.recompute == pytest.approx(slow.time.forward, rel=0.01)
    assert slow.mfu == pytest.approx(slow.images_per_second * slow.flops.training / (8 * 125e12))


def test_a_step_computes_every_micro_batch_and_updates_once() -> None:
    def times(accumulation: int) -> StepTime:
        return plan("seer_256gf", machine(efficiency=0.1), nodes=1, gpus_per_node=8,
                    overrides=["sharding.sync_bn_group_size=8",
                               f"train.gradient_accumulation={accumulation}"],
                    profile=NO_ACTIVATIONS).time  # fmt: skip

    once, thrice = vars(times(1)), vars(times(3))
    for term in ("forward", "backward", "recompute", "memory_bound", "sync_batch_norm", "sinkhorn"):
        assert thrice[term] == pytest.approx(3 * once[term]), term
        assert once[term] > 0
    assert thrice["optimizer"] == once["optimizer"]


def test_what_passes_through_memory_is_what_batch_norm_gets() -> None:
    trunk = build_trunk("regnety_debug", device="meta")
    elements = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        nonlocal elements
        elements += inputs[0].numel()

    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count)
    for crops, size in ((2, 64), (4, 32)):
        trunk(torch.empty(crops, 3, size, size, device="meta"))
    config = TRUNKS["regnety_debug"]
    whole, half = (
        traffic(config, Batch(4, 1, (64, 32), (2, 4), precision), frozenset())
        for precision in ("fp32", "bf16")
    )
    assert whole == (4 * 6 * elements, 4 * 8 * elements)
    assert half == (2 * 6 * elements, 2 * 8 * elements)


@pytest.mark.parametrize(("flops", "waited"), [(4e12, 0.15), (0.1e12, 0.6 - 0.02)])
def test_reductions_hide_behind_the_backward_pass_but_for_the_last(
    flops: float, waited: float
) -> None:
    """Four all-reduces of 0.15 s each, beside a backward pass of 0.8 s or 0.02 s."""
    reductions = Message("gradients", "all_reduce", 1e9, 4, Ranks(4, 1), "backward")
    hardware = machine(
        efficiency=0.5, peak_tflops={"nominal": {"fp32": 10}, "measured": None},
        latency_us={"intra": 1e-9, "inter": 1e-9},
    )  # fmt: skip
    found = step_time(
        TRUNKS["regnety_debug"],
        Flops({}, forward=0, training=int(flops), recompute=0, torch_counter=0),
        Batch(1, 1, (32,), (0,), "fp32"),  # without crops, so without other layers
        hardware,
        [reductions],
        recomputed=frozenset(),
        held_parameters=0,
        on_host=0,
    )
    assert found.backward == pytest.approx(flops / 5e12)
    assert found.gradients == pytest.approx(waited)


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
    assert (found.images, found.steps) == (10**9, 10**9 // 8704)  # the recipe's images
    assert found.days == pytest.approx(10**9 / 8704 * found.time.total / 86_400)
    assert found.to_dict()["gpu_hours"] == pytest.approx(512 * 24 * found.days)
