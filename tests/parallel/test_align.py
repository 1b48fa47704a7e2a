"""Aligned channels: the same training under every strategy, with padding that stays zero.

The debug trunk's groups of 8 are padded to 9, its stem of 32 to 33: zeros lie between all groups,
and slices begin and end among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from seer_scale.models import paddings_of
from seer_scale.models.padding import Padding
from seer_scale.parallel.engine import Engine
from tests.parallel.parity import (
    CASES,
    GPU_CASES,
    build_engine,
    configuration,
    run,
    whole_tensors,
    worst_loss,
    worst_tensor,
)

Distributed = Callable[..., list[Any]]
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


def differences(aligned: Trained, plain: Trained) -> dict[str, float]:
    """Of losses and norms relative, of tensors relative to their largest element."""
    tensors = {
        kind: max(
            float((a[name].double() - b[name].double()).abs().max() / b[name].double().abs().max())
            for name in b
        )
        for kind, a, b in [
            ("values", aligned.values, plain.values),
            ("momenta", aligned.momenta, plain.momenta),
        ]
    }
    return {
        "losses": worst_loss(aligned.losses, plain.losses),
        "norms": worst_loss(aligned.norms, plain.norms),
        **tensors,
    }
