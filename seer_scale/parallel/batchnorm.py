"""Grouped SyncBatchNorm: BatchNorm whose statistics are shared by groups of ranks.

Ioffe and Szegedy (arXiv 1502.03167), algorithm 1, over the batch of a group of ranks. A layer needs
one collective in the forward pass and one in the backward pass, with kernels that every device has
or, on GPUs, those of batchnorm_gpu.py. A recomputation of activation checkpointing needs none: it
replays the statistics of the first forward pass, so that running statistics are updated once per
step.

Under torch.compile a layer is part of one graph. With activation checkpointing compile what is
inside of `checkpoint`, not around it: torch accepts the contexts of this file only in a graph of
its own making.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from seer_scale import distributed
from seer_scale.parallel import batchnorm_gpu
from seer_scale.parallel.batch_statistics import group_statistics, is_recomputing


class _Normalize(torch.autograd.Function):
    """Normalises by the group's statistics; the backward pass differentiates those statistics too.

    Both directions run torch's own kernels, which take low-precision input with float32 statistics.
    The gradient is (weight / std) * (grad - mean(grad) - normalised * mean(grad * normalised)),
    means over the group (the derivatives of section 3 of arXiv 1502.03167, collected). All of it
    but the term of `grad` itself is a normalisation of x with another weight and another bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        inverse_std: Tensor,
        negative_count: Tensor,
        eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, inverse_std, negative_count)
        ctx.eps, ctx.group = eps, group
        return _normalized(x, mean, variance, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, inverse_std, negative_count = ctx.saved_tensors
        # CUDA's kernel asserts that it gets the saved statistics (the two tensors after the
        # running ones); the CPU's takes them from the running ones and returns the same bits.
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0],
            x,
            weight,
            mean,
            variance,
            mean,
            inverse_std,
            False,
            ctx.eps,
            [False, True, True],
        )
        # Parameter gradients stay local: the sharding strategy averages them with the others.
        sums = torch.stack([grad_bias, grad_weight])  # [2, C]
        distributed.all_reduce(sums, "sum", ctx.group)
        slope = weight * inverse_std  # [C]
        offset, on_normalised = sums.mul_(slope).div_(negative_count).unbind()
        grad_x = _normalized(x, mean, variance, on_normalised, offset, ctx.eps)
        grad_x.addcmul_(grads[0], slope.view(1, -1, *[1] * (x.dim() - 2)))
        return grad_x, grad_weight, grad_bias, *[None] * 6


def _normalized(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Normalises by given statistics, with torch's kernel and nothing around it."""
    y, _, _ = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)
    return y


class GroupedSyncBatchNorm(_BatchNorm):
    """BatchNorm over the batch of every rank in `group`; over the local batch if `group` is None.

    Statistics, running or not, are float32 or wider under every precision. Parameter and buffer
    names are those of `torch.nn.BatchNorm2d`.

    Args:
        num_features: number of channels C.
        group: ranks that share statistics; None for this rank alone.
        eps: number that is added to the variance.
        momentum: share of a step's statistics in the running statistics.
        device: device of parameters and buffers.
        dtype: type of parameters and buffers.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        group: dist.ProcessGroup | None = None,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, device=device, dtype=dtype)
        self.group = group

    def forward(self, input: Tensor) -> Tensor:
        """Normalises `input` [B, C, ...]; training updates the running statistics once per step.

        Raises:
            ValueError: if `input` has fewer than two dimensions.
        """
        if input.dim() < 2:
            raise ValueError(f"BatchNorm expects [B, C, ...], got {tuple(input.shape)}")
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if self.group is None:
            return self._forward_local(input)
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        rest = (*running, cast(float, self.momentum), self.eps, self.group)
        if batchnorm_gpu.takes(input):
            x = batchnorm_gpu.dense(input)
            with torch.no_grad():
                shared = batchnorm_gpu.group_statistics(x, *rest)
            return batchnorm_gpu.normalize(x, self.weight, self.bias, shared, self.eps, self.group)
        with torch.no_grad():
            statistics = group_statistics(input, *rest)
        y: Tensor = _Normalize.apply(
            input, self.weight, self.bias, *statistics, self.eps, self.group
        )
        return y

    def _forward_local(self, input: Tensor) -> Tensor:
        # torch's own kernel. A recomputation must save the same tensors for the backward pass, so
        # the running statistics are passed too, with a momentum that leaves them as they are.
        replay = is_recomputing()
        if not replay:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=True,
            momentum=0.0 if replay else cast(float, self.momentum),
            eps=self.eps,
        )
