"""Grouped SyncBatchNorm: BatchNorm whose statistics are shared by groups of ranks.

One all-reduce forward and one backward per layer, on CPU (gloo) and CUDA (nccl) alike; none in the
recomputation of activation checkpointing, which replays the statistics of the first forward so
that running statistics move once per step. Uneven batches are weighted by their size.

Under torch.compile a layer is part of one graph. With activation checkpointing compile what is
inside of `checkpoint`, not around it: torch takes contexts of its own making only in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from threading import local
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seer_scale import distributed

Statistics = tuple[Tensor, Tensor, Tensor]  # mean [C], biased variance [C], count []

_recompute = local()


class _Tape:
    """The statistics that the layers of one checkpointed region computed, in call order."""

    def __init__(self) -> None:
        self.statistics: list[Statistics] = []
        self.position: int | None = None  # None while recording

    def next(self) -> Statistics:
        assert self.position is not None
        self.position += 1
        return self.statistics[self.position - 1]


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The two contexts that `torch.utils.checkpoint(context_fn=...)` asks for.

    BatchNorm layers record their statistics in the first and reuse them in the second: no second
    collective, no second update of the running statistics.
    """
    tape = _Tape()

    @contextmanager
    def use(position: int | None) -> Iterator[None]:
        outer = getattr(_recompute, "tape", None)
        tape.position = position
        _recompute.tape = tape
        try:
            yield
        finally:
            _recompute.tape = outer

    return use(None), use(0)


def _statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    momentum: float,
    group: dist.ProcessGroup,
) -> Statistics:
    """The group's statistics of `x`: in a recomputation those of the first forward."""
    tape = getattr(_recompute, "tape", None)
    if tape is not None and tape.position is not None:
        return cast(Statistics, tape.next())
    mean, variance, count = _reduce_statistics(x, group)
    unbiased = variance * (count / (count - 1).clamp_min(1))
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    batches.add_(1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    statistics = mean.to(dtype), variance.to(dtype), count.to(dtype)
    if tape is not None:
        tape.statistics.append(statistics)
    return statistics


def _reduce_statistics(x: Tensor, group: dist.ProcessGroup) -> Statistics:
    """Mean, variance and count over the group by one all-reduce, in float64.

    Each rank's mean and variance come from torch's BatchNorm kernel in float32 and are combined
    in float64, where the textbook sum of squares is exact enough whatever the ratio of mean to
    deviation.
    """
    dtype, channels = torch.promote_types(x.dtype, torch.float32), x.shape[1]
    # The kernel computes in the type of the running buffers; without any, in that of x.
    scratch = x.new_zeros(2, channels, dtype=dtype)
    local_mean, local_variance = torch.batch_norm_update_stats(x, scratch[0], scratch[1], 0.0)
    local_mean, local_variance = local_mean.double(), local_variance.double()
    local_count = local_mean.new_full((1,), x.numel() // channels)
    squares = local_variance + local_mean.square()
    sums = torch.cat([local_mean * local_count, squares * local_count, local_count])
    distributed.all_reduce(sums, "sum", group)
    count = sums[-1]
    mean = sums[:channels] / count
    return mean, (sums[channels:-1] / count - mean.square()).clamp_min_(0), count


# One operator to a compiler, so that the graphs of a forward and of its recomputation are the same
# and the tape is consulted when they run.
@torch.library.custom_op(
    "seer_scale::group_statistics", mutates_args=("running_mean", "running_var", "batches")
)
def _traced_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    momentum: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    process_group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]
    mean, variance, count = _statistics(
        x, running_mean, running_var, batches, momentum, process_group
    )
    # What an operator returns is the compiler's to overwrite; the tape keeps its own.
    return mean.clone(), variance.clone(), count.clone()


@_traced_statistics.register_fake
def _(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    momentum: float,
    group: str,
) -> Statistics:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = x.new_empty(x.shape[1], dtype=dtype)
    return mean, torch.empty_like(mean), mean.new_empty(())


class _Normalize(torch.autograd.Function):
    """Normalisation by the group's statistics; the backward sees through those statistics.

    Both directions run torch's own inference kernels, which take low-precision input with float32
    statistics. The backward adds what inference lacks: d(mean) and d(variance), that is
    -(weight / std) * (mean(grad) + normalised * mean(grad * normalised)) over the group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.group = eps, group
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        # Parameter gradients stay local: the sharding strategy averages them with the others.
        sums = torch.stack([grad_bias, grad_weight])
        mean_grad, mean_grad_normalised = distributed.all_reduce(sums, "sum", ctx.group) / count
        inverse_std = (variance + ctx.eps).rsqrt()
        slope = -weight * inverse_std.square() * mean_grad_normalised
        offset = -weight * inverse_std * mean_grad - slope * mean
        shape = (1, -1) + (1,) * (x.dim() - 2)
        slope, offset = slope.to(x.dtype).view(shape), offset.to(x.dtype).view(shape)
        grad_x = grad_x.addcmul_(x, slope).add_(offset)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


class GroupedSyncBatchNorm(_BatchNorm):
    """BatchNorm over the batch of every rank in `group`; over the local batch where it is None.

    Statistics, running or not, are float32 or wider under every precision. Parameter and buffer
    names are those of `torch.nn.BatchNorm2d`.

    Args:
        num_features: channels C.
        group: ranks that share statistics; None for this rank alone.
        eps: added to the variance.
        momentum: share of a step's statistics in the running ones.
        device: where parameters and buffers are made.
        dtype: of both.
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
        """Input and output [B, C, ...]; in training the running statistics move once per step."""
        if input.dim() < 2:
            raise ValueError(f"BatchNorm expects [B, C, ...], got {tuple(input.shape)}")
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if self.group is None:
            return self._forward_local(input)
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        momentum = cast(float, self.momentum)
        with torch.no_grad():
            if torch.compiler.is_compiling():
                name = self.group.group_name
                statistics = _traced_statistics(input, *running, momentum, name)
            else:
                statistics = _statistics(input, *running, momentum, self.group)
        y: Tensor = _Normalize.apply(
            input, self.weight, self.bias, *statistics, self.eps, self.group
        )
        return y

    def _forward_local(self, input: Tensor) -> Tensor:
        # torch's own kernel. A recomputation must save the same tensors for the backward, so it
        # passes the running statistics too, with a momentum that leaves them as they are.
        tape = getattr(_recompute, "tape", None)
        replay = tape is not None and tape.position is not None
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


@cache
def _groups(world_size: int, size: int) -> tuple[dist.ProcessGroup, ...]:
    """Contiguous groups of `size` ranks; made once, by every rank in the same order."""
    groups = []
    for first in range(0, world_size, size):
        group = dist.new_group(list(range(first, min(first + size, world_size))))
        groups.append(cast(dist.ProcessGroup, group))  # an int on ranks that are no members
    return tuple(groups)


def sync_group(group_size: int) -> dist.ProcessGroup | None:
    """This rank's BatchNorm group: 0 global, -1 its node, n contiguous groups of n.

    The last group may be smaller, as in VISSL. None stands for a group of one rank.
    """
    world = distributed.world_size()
    size = {0: world, -1: distributed.local_world_size()}.get(group_size, group_size)
    index = distributed.rank() // size
    if min(size, world - index * size) == 1:
        if 1 < size < world:
            _groups(world, size)  # new_group is collective: the rank left over takes part
        return None
    return _groups(world, size)[index]


def convert_sync_batchnorm(
    model: nn.Module, group_size: int, layer: Callable[..., _BatchNorm] = GroupedSyncBatchNorm
) -> nn.Module:
    """Replaces every BatchNorm of `model` by a grouped SyncBatchNorm, in place; returns the model.

    Parameters and buffers are taken over, on the meta device too. With one rank per group the
    layers do not communicate but still survive activation checkpointing.

    Args:
        model: with BatchNorm layers of torch.
        group_size: see `sync_group`.
        layer: makes one, with the arguments of `GroupedSyncBatchNorm`.

    Raises:
        ValueError: for a layer without weights, running statistics or a momentum.
    """
    group = sync_group(group_size)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, GroupedSyncBatchNorm):
                if not child.affine or not child.track_running_stats or child.momentum is None:
                    raise ValueError(f"{name}: {child} has no weights, statistics or momentum")
                norm = layer(
                    child.num_features,
                    group,
                    eps=child.eps,
                    momentum=child.momentum,
                    device="meta",
                )
                norm.weight, norm.bias = child.weight, child.bias
                for key, buffer in child.named_buffers():
                    setattr(norm, key, buffer)
                norm.train(child.training)
                setattr(parent, name, norm)
    return model


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Averages running statistics over all ranks, in place: groups saw different data.

    Called before saving, export and evaluation, so that no group's statistics stand for all.
    """
    world = distributed.world_size()
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if world == 1 or not buffers:
        return
    flat = distributed.all_reduce(torch.cat([buffer.double() for buffer in buffers])) / world
    for buffer, mean in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean)
