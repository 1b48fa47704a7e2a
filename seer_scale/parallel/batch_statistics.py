"""Statistics of BatchNorm over a group of ranks: one all-reduce, and none in a recomputation.

Ioffe and Szegedy (arXiv 1502.03167), algorithm 1, with the batch of a whole group of ranks in
place of one rank's. Each rank's mean and variance are combined as partial results (Chan, Golub and
LeVeque 1979), weighted by the rank's number of elements, so that uneven batches are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import local
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from seer_scale import distributed

# Mean [C], biased variance [C], 1 / sqrt(variance + eps) [C]; minus the number of elements [1],
# float64.
Statistics = tuple[Tensor, Tensor, Tensor, Tensor]

_Statistics = TypeVar("_Statistics", bound=tuple[Tensor, ...])
_recompute = local()


class _Tape:
    """Statistics that the layers of one checkpointed region computed, in the order of the calls."""

    def __init__(self) -> None:
        self.statistics: list[tuple[Tensor, ...]] = []
        self.position: int | None = None  # None while recording

    def next(self) -> tuple[Tensor, ...]:
        assert self.position is not None
        self.position += 1
        return self.statistics[self.position - 1]


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Creates the two contexts that `torch.utils.checkpoint(context_fn=...)` asks for.

    BatchNorm layers record their statistics in the first context (the forward pass) and reuse them
    in the second (the recomputation): no second collective, and no second update of the running
    statistics.
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


def is_recomputing() -> bool:
    """Whether this thread is inside the recomputation of a checkpointed region."""
    tape = getattr(_recompute, "tape", None)
    return tape is not None and tape.position is not None


def recorded(compute: Callable[[], _Statistics]) -> _Statistics:
    """Returns what `compute` returns; in a recomputation, what it returned the first time."""
    tape = getattr(_recompute, "tape", None)
    if tape is not None and tape.position is not None:
        return cast(_Statistics, tape.next())
    statistics = compute()
    if tape is not None:
        tape.statistics.append(statistics)
    return statistics


def group_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup,
) -> Statistics:
    """Computes the group's mean, biased variance and count; updates the running statistics.

    In a recomputation the statistics of the first forward pass are returned, and the running ones
    stay as they are. Under torch.compile this is one operator of the graph.

    Args:
        x: input [B, C, ...] of this rank, not empty.
        running_mean: [C], float32 or wider, changed in place.
        running_var: [C], unbiased, of the same type, changed in place.
        batches: number of batches seen, [], changed in place.
        momentum: share of this batch in the running statistics.
        eps: number that is added to the variance under the root.
        group: two or more ranks that share statistics.

    Returns:
        mean, biased variance and 1 / sqrt(variance + eps), each [C] of the running statistics'
        type, and minus the number of elements per channel, [1] float64.
    """
    if torch.compiler.is_compiling():
        name = group.group_name
        traced: Statistics = _traced(x, running_mean, running_var, batches, momentum, eps, name)
        return traced
    return _statistics(x, running_mean, running_var, batches, momentum, eps, group)


def _statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup,
) -> Statistics:
    def compute() -> Statistics:
        sums, count, parts = _sums(x, running_mean, running_var, group)
        moments = sums / count
        mean, squares, _, _ = moments.split_with_sizes(parts)
        squares.addcmul_(mean, mean, value=-1)  # now the variance
        mean, variance, _, share = moments.to(running_mean.dtype).split_with_sizes(parts)
        variance.clamp_min_(0)
        torch._foreach_lerp_([running_mean, running_var], [mean, variance / share], momentum)
        batches.add_(1)
        return mean, variance, (variance + eps).rsqrt_(), count

    return recorded(compute)


def _sums(
    x: Tensor, running_mean: Tensor, running_var: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, list[int]]:
    """Sums over the group by one all-reduce, [2 C + 2] float64, with the count in them, [1].

    These are the sum [C], the sum of squares [C], the number of elements and one less than that
    number, all four negative, which saves the backward pass a call; the lengths of these four
    parts come last. Each rank's mean and variance come from
    torch's BatchNorm kernel in float32. They are combined in float64, where the plain sum of
    squares is exact enough for any ratio of mean to deviation.
    """
    parts = [x.shape[1], x.shape[1], 1, 1]
    # The kernel computes in the type of the running statistics, which a momentum of 0 leaves alone.
    mean, variance = torch.batch_norm_update_stats(x, running_mean, running_var, 0.0)
    sums = mean.new_full((sum(parts),), -(x.numel() // x.shape[1]), dtype=torch.float64)
    total, squares, count, less = sums.split_with_sizes(parts)
    torch._foreach_mul_([total, squares], [mean, variance])
    squares.addcmul_(total, mean)
    less.add_(1 / dist.get_world_size(group))
    return distributed.all_reduce(sums, "sum", group), count, parts


# The compiler sees one opaque operator: the graphs of a forward pass and of its recomputation are
# the same, and the tape is read when they run.
@torch.library.custom_op(
    "seer_scale::group_statistics", mutates_args=("running_mean", "running_var", "batches")
)
def _traced(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    momentum: float,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    process_group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]
    mean, variance, inverse_std, count = _statistics(
        x, running_mean, running_var, batches, momentum, eps, process_group
    )
    # The compiler may overwrite the results of an operator; the tape keeps tensors of its own.
    return mean.clone(), variance.clone(), inverse_std.clone(), count.clone()


@_traced.register_fake
def _(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    momentum: float,
    eps: float,
    group: str,
) -> Statistics:
    mean, variance, inverse_std = (torch.empty_like(running_mean) for _ in range(3))
    return mean, variance, inverse_std, mean.new_empty((1,), dtype=torch.float64)
