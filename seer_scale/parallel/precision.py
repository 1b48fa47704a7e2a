"""Precision of the forward pass; weights, optimizer state, BatchNorm and loss stay float32.

Mixed precision of Micikevicius et al. (arXiv 1710.03740), by torch's autocast inside the model's
forward pass, the same for every strategy. DeepSpeed's own sections are not used: `bf16` and `fp16`
cast BatchNorm, and `torch_autocast` decides about loss scaling by itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

AUTOCAST = {"bf16": torch.bfloat16, "amp-o1": torch.float16}
SCALED = frozenset({"amp-o1", "apex-o1"})  # float16, whose gradients need a loss scale


def gathered_as(strategy: str, precision: str, *, compiled: bool) -> torch.dtype | None:
    """Returns the type in which ranks gather the weights of convolutions and linear layers.

    None stands for their own type, float32. A gathered weight of 16 bit has the bits that autocast
    would give a weight of 32 bit. A compiled block adds up the gradients of several resolutions
    within its graph, in the type of the weight, so that its weights stay float32.

    Args:
        strategy: ddp, fsdp, hsdp, zero or fairscale.
        precision: fp32, bf16, amp-o1 or apex-o1.
        compiled: whether blocks are compiled.
    """
    if compiled or strategy not in ("fsdp", "hsdp", "zero"):
        return None
    return AUTOCAST.get(precision)


def held_as(strategy: str, precision: str, *, compiled: bool) -> torch.dtype | None:
    """Returns the type in which gathered weights are held, as `gathered_as` returns its own.

    DeepSpeed makes float32 of what it has gathered in 16 bit.
    """
    return None if strategy == "zero" else gathered_as(strategy, precision, compiled=compiled)


def apply_autocast(model: nn.Module, precision: str, device: torch.device) -> None:
    """Makes the forward pass of `model` run under autocast if `precision` needs it, in place.

    Args:
        model: a model whose float32 regions (prototypes, norms) switch autocast off themselves.
        precision: bf16 or amp-o1; fp32 leaves the model as it is, and so does apex-o1, which
            `apex.apply_o1` applies.
        device: device of the training.
    """
    if precision not in AUTOCAST:
        return
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # The cache would keep a copy of every weight until the pass ends: with sharding that would
        # be the whole model on every rank.
        with torch.autocast(device.type, AUTOCAST[precision], cache_enabled=False):
            return inner(*args, **kwargs)

    model.forward = forward
