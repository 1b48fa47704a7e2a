"""LARC: layer-wise adaptive rate control, from the norms of whole tensors however they are cut.

You, Gitman and Ginsburg (arXiv 1708.03888), with Apex's constants and without its clipping, as SEER
trains. For a tensor p with gradient g, weight decay d and trust coefficient t:

    ratio = t * |p| / (|g| + d * |p| + eps),    g <- ratio * (g + d * p)

Where |p| or |g| is 0, g stays as it is, without weight decay (VISSL's `larc_fsdp.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seer_scale import distributed
from seer_scale.optim.update import wide_norms


def whole_norms(
    values: list[Tensor], grads: list[Tensor], *, shards: int, shard_group: dist.ProcessGroup | None
) -> Tensor:
    """Computes the norms of N whole tensors and of their gradients, [2, N], by one all-reduce.

    Args:
        values: this rank's slice [n] of each tensor, without padding.
        grads: this rank's slice [n] of each gradient, without padding.
        shards: ranks that each hold one part of every tensor.
        shard_group: those ranks; None for the world.
    """
    # A sum in float64 does not depend, once rounded, on how the tensor is cut: every strategy takes
    # the same step, not only nearly the same.
    norms = torch.stack(wide_norms([*values, *grads]))
    if shards > 1:
        norms = distributed.all_reduce(norms.square(), group=shard_group).sqrt()
    return norms.to(values[0].dtype).view(2, -1)


def factors(
    norms: Tensor,
    groups: Sequence[dict[str, Any]],
    *,
    trust_coefficient: float | None,
    scale: float,
) -> list[tuple[Tensor, Tensor]]:
    """Computes what each gradient and each value is multiplied by in the update, [] and [].

    The formula is evaluated for all tensors at once, once for each pair of weight decay and eps:
    one evaluation in pretraining, two where BatchNorm is not decayed.

    Args:
        norms: value and gradient norms of the whole tensors, [2, N].
        groups: the N tensors' parameter groups, with `weight_decay` and `eps`.
        trust_coefficient: LARC's t; None for plain SGD, whose factors are 1 and the weight decay.
        scale: inverse of the loss scale that the gradients still carry.
    """
    settings = [(group["weight_decay"], group["eps"]) for group in groups]
    found = {}
    for setting in set(settings):
        on_grad, on_value = _coefficients(norms, trust_coefficient, *setting)
        found[setting] = (on_grad * scale).unbind(), on_value.unbind()
    return [
        (found[setting][0][index], found[setting][1][index])
        for index, setting in enumerate(settings)
    ]


def _coefficients(
    norms: Tensor, trust_coefficient: float | None, weight_decay: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Factors of gradient and value, [N] each, for one setting; `norms` [2, N]."""
    value_norm, grad_norm = norms
    if trust_coefficient is None:
        return torch.ones_like(grad_norm), torch.full_like(grad_norm, weight_decay)
    ratio = trust_coefficient * value_norm
    ratio = ratio / (grad_norm + weight_decay * value_norm + eps)
    adapt = (value_norm > 0) & (grad_norm > 0)
    one, zero = torch.ones_like(ratio), torch.zeros_like(ratio)
    return torch.where(adapt, ratio, one), torch.where(adapt, ratio * weight_decay, zero)
