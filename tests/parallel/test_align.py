"""Aligned channels: the same training under every strategy, with padding that stays zero.

The debug trunk's groups of 8 are padded to 9, its stem of 32 to 33: zeros lie between all groups,
and slices begin and end among them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from harness.parity import (
    CASES,
    GPU_CASES,
    build,
    build_engine,
    configuration,
    run,
    whole_tensors,
    worst_loss,
    worst_tensor,
)
from harness.pool import Distributed
from seer_scale.models import paddings_of
from seer_scale.models.padding import Padding
from seer_scale.parallel.engine import Engine
from seer_scale.train.build_engine import recompute_plan_of

STEPS, MULTIPLE = 10, 3
CPU = torch.device("cpu")


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    values: dict[str, Tensor]  # without padding
    momenta: dict[str, Tensor]
    padded: int  # elements of padding that this rank holds
    strange: list[str]  # tensors of which an element of padding is not +0.0


def padding_of(flat: Tensor, offset: int, padding: Padding) -> Tensor:
    """The elements of a slice that are padding, by a mask of the whole tensor."""
    ones = torch.ones(torch.Size(padding.real_shape).numel())
    size = torch.Size(padding.held_shape).numel()
    return flat[padding.put_in(ones, 0, size)[offset : offset + len(flat)] == 0]


def paddings(engine: Engine) -> dict[str, Tensor]:
    """All elements of padding that this rank holds, of weights, momenta and buffers."""
    found = {}
    for part in engine.slices():
        if part.padding:
            for kind in ("values", "momentum"):
                held = getattr(part, kind)
                found[f"{part.name} {kind}"] = padding_of(held, part.offset, part.padding).clone()
    buffers = dict(engine.model.named_buffers())
    for name, padding in paddings_of(engine.model).items():
        if name in buffers:
            found[name] = padding_of(buffers[name].view(-1), 0, padding)
    return found


def train(
    name: str, multiple: int, dtype: torch.dtype, checkpointing: str, more: dict[str, Any]
) -> Trained:
    case = (CASES | GPU_CASES)[name]
    model = configuration(case).model.model_dump() | {"align_channels": multiple}
    config = configuration(case, checkpointing, **more, model=model)
    engine = build_engine(case, config, CPU, dtype)
    losses, norms = run(engine, config, STEPS, CPU, dtype)
    held = paddings(engine)
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}
    return Trained(
        losses,
        norms,
        whole_tensors(engine),
        whole_tensors(engine, "momentum"),
        sum(zeros.numel() for zeros in held.values()),
        [name for name, zeros in held.items() if zeros.view(bits[zeros.dtype]).any()],
    )


@cache
def expected() -> Trained:
    """One process, no padding, float64."""
    return train("ddp", 1, torch.float64, "none", {})


def off(actual: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """Largest difference of a tensor, relative to its largest element."""
    assert actual.keys() == plain.keys()
    return max(
        float((actual[name] - value).abs().max() / value.abs().max().clamp(1e-30))
        for name, value in plain.items()
    )


FUSED = {"optim": {"fuse_backward": True}}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "world_size", "checkpointing", "more"),
    [
        ("ddp", 1, "none", {}),
        pytest.param("ddp", 1, "full", FUSED, marks=SLOW),
        pytest.param("ddp", 2, "full", {}, marks=SLOW),
        pytest.param("fsdp", 1, "none", {}, marks=SLOW),
        ("fsdp", 2, "full", FUSED),
        pytest.param("fsdp", 2, "none", {}, marks=SLOW),
        pytest.param("hsdp(2x2)", 4, "full", {}, marks=SLOW),
    ],
)
def test_in_float64_it_is_the_same_training(
    distributed: Distributed,
    name: str,
    world_size: int,
    checkpointing: str,
    more: dict[str, Any],
) -> None:
    ranks = distributed(train, world_size, name, MULTIPLE, torch.float64, checkpointing, more)
    plain = expected()
    assert worst_loss(ranks[0].losses, plain.losses) < 1e-12
    assert worst_loss(ranks[0].norms, plain.norms) < 1e-12
    assert off(ranks[0].values, plain.values) < 1e-12
    assert off(ranks[0].momenta, plain.momenta) < 1e-12  # which every gradient has gone into
    assert_padding_is_zero(ranks)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "world_size", "checkpointing"),
    [
        ("zero3", 2, "full"),
        *(
            pytest.param(name, world_size, "none", marks=SLOW)
            for name in ("zero0", "zero1", "zero2", "zero3")
            for world_size in (1, 2)
        ),
        pytest.param("zero1+cpu-offload", 2, "none", marks=SLOW),
        pytest.param("zero3+cpu-offload", 2, "none", marks=SLOW),
    ],
)
def test_zero_whose_masters_are_float32_follows(
    distributed: Distributed, name: str, world_size: int, checkpointing: str
) -> None:
    ranks = distributed(train, world_size, name, MULTIPLE, torch.float32, checkpointing, {})
    assert worst_loss(ranks[0].losses, expected().losses) < 1e-4  # test_parity.py's tolerance
    assert max(worst_tensor(ranks[0].values, expected().values)) < 1e-4
    assert ranks[0].norms == pytest.approx(expected().norms, rel=1e-2)
    assert_padding_is_zero(ranks)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("amp-o1", marks=SLOW)])
def test_in_half_precision_padding_stays_zero(distributed: Distributed, precision: str) -> None:
    more = {"train": {"steps": STEPS, "micro_batch_size": 4, "precision": precision}}
    ranks = distributed(train, 2, "fsdp", MULTIPLE, torch.float32, "none", more)
    assert worst_loss(ranks[0].losses, expected().losses) < 0.02  # of a precision, not of padding
    assert_padding_is_zero(ranks)


def test_a_budget_for_activations_counts_the_padding() -> None:
    peaks = []
    for multiple in (1, 12):  # groups of 8 become 12
        model = configuration(CASES["ddp"]).model.model_dump() | {"align_channels": multiple}
        plan = recompute_plan_of(configuration(CASES["ddp"], "auto:1", model=model), build)
        assert plan is not None
        peaks.append(plan.peak)
    assert 1.2 < peaks[1] / peaks[0] < 1.5


def assert_padding_is_zero(ranks: list[Trained]) -> None:
    for rank in ranks:
        assert rank.padded > 1000
        assert rank.strange == []
