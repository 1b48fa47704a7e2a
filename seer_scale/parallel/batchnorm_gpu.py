"""Grouped SyncBatchNorm with the GPU kernels of torch's own SyncBatchNorm.

The backward pass makes four calls into torch, where the kernels that every device has need eight,
and reads or writes five tensors of x's size instead of seven. The forward pass of a small group
makes nine instead of sixteen, but gathers the statistics of every rank instead of their sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seer_scale import distributed
from seer_scale.parallel import batch_statistics

# A gather's bytes, [ranks, 2 C + 1] float32, grow with the group; those of a sum do not. By the
# planner, on nodes of 8 H100, seer_256gf waits 11 ms a step for gathers in groups of 8, 15 ms for
# sums; 22 and 21 ms in groups of 16; 61 and 35 ms in groups of 64.
MOST_GATHERED = 16

# Mean [C] and 1 / sqrt(variance + eps) [C] of the group, float32 or wider; numbers of elements per
# channel, int32, whose sum is the group's: of each rank [ranks], or their sum [1].
Statistics = tuple[Tensor, Tensor, Tensor]


def dense(x: Tensor) -> Tensor:
    """Returns x in a layout that the kernels are made for, copied if it has another one."""
    return x.contiguous(memory_format=_layout(x))


def takes(x: Tensor) -> bool:
    """Whether these kernels take `x`; torch.compile does not know the shapes that they return."""
    return x.is_cuda and not torch.compiler.is_compiling()


def group_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup,
) -> Statistics:
    """Does what `batch_statistics.group_statistics` does, from the same arguments.

    x is dense: contiguous or channels_last.
    """
    channels, own_count = x.shape[1], x.numel() // x.shape[1]
    if (size := distributed.world_size(group)) > MOST_GATHERED:
        mean, _, inverse_std, negative_count = batch_statistics.group_statistics(
            x, running_mean, running_var, batches, momentum, eps, group
        )
        return mean, inverse_std, in_32_bits(negative_count, size * own_count)

    def compute() -> Statistics:
        mean, inverse_std = torch.batch_norm_stats(x, eps)
        own = torch.cat([mean, inverse_std, mean.new_full((1,), own_count)])
        ranks = distributed.all_gather(own, group).view(-1, len(own))
        means, inverse_stds, counts = ranks.split_with_sizes([channels, channels, 1], dim=1)
        counts = counts.reshape(-1)
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            *(x, means, inverse_stds, running_mean, running_var, momentum, eps, counts)
        )
        batches.add_(1)
        return mean, inverse_std, counts.int()

    return batch_statistics.recorded(compute)


def in_32_bits(negative_count: Tensor, about: int) -> Tensor:
    """Divides a group's count into equal parts of 32 bits, which the kernels add in 64 bits.

    Args:
        negative_count: minus the number of elements, [1] float64.
        about: that number on the host, to a factor of 2.
    """
    parts = 1 + about // 2**30
    counts = negative_count.div(-parts).int()
    return counts.repeat(parts) if parts > 1 else counts


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Statistics,
    eps: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """Normalises by the group's statistics; the backward pass differentiates those statistics too.

    Parameter gradients stay local: the sharding strategy averages them with the others.
    """
    y: Tensor = _Normalize.apply(x, weight, bias, *statistics, eps, group)
    return y


class _Normalize(torch.autograd.Function):
    """The gradient of x needs two sums over the group, those of weight and bias do not."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        inverse_std: Tensor,
        counts: Tensor,
        eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse_std, counts)
        ctx.group = group
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, counts = ctx.saved_tensors
        # Of another layout than x the kernels would take a slower way to the same values.
        grad = grads[0].contiguous(memory_format=_layout(x))
        own = torch.batch_norm_backward_reduce(grad, x, mean, inverse_std, weight, True, True, True)
        # Of grad, and of grad (x - mean).
        total, moment = distributed.all_reduce(torch.stack(own[:2]), "sum", ctx.group).unbind()
        grad_x = torch.batch_norm_backward_elemt(
            grad, x, mean, inverse_std, weight, total, moment, counts
        )
        return grad_x, *own[2:], *[None] * 5


def _layout(x: Tensor) -> torch.memory_format:
    """The layout of x if the kernels are made for it, or contiguous."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
