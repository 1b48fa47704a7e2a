"""Rows of unit length: SwAV's rule for its prototypes after every step (arXiv 2006.09882)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from seer_scale import distributed


def normalise_rows_(
    values: Tensor,
    offset: int,
    shape: tuple[int, ...],
    *,
    skipped: Tensor,
    shards: int,
    shard_group: dist.ProcessGroup | None,
) -> None:
    """Scales the rows of a matrix to length one, on this rank's slice and in place.

    Args:
        values: the slice [n], a contiguous run of the matrix's elements; it may cut rows.
        offset: number of elements of the matrix before the slice.
        shape: shape of the whole matrix, [rows, width].
        skipped: [] bool; True leaves the rows as they are, bit for bit.
        shards: ranks that each hold one part of the matrix.
        shard_group: those ranks; None for the world.
    """
    length = values.numel()
    rows, width = shape
    first, lead = divmod(offset, width) if length else (0, 0)  # else: the slice is padding only
    # Zeros complete the slice to whole rows; the all-reduce completes their sums of squares.
    touched = -(-(lead + length) // width)
    padded = values.new_zeros(touched * width)
    padded[lead : lead + length] = values
    squared = values.new_zeros(rows, dtype=torch.float64)
    squared[first : first + touched] = padded.view(touched, width).double().square().sum(1)
    if shards > 1:
        distributed.all_reduce(squared, group=shard_group)
    norms = squared.sqrt().clamp_min_(1e-12)[first : first + touched].to(values.dtype)
    norms = norms.masked_fill_(skipped, 1)  # division could change a row in its last bit
    padded = padded.view(touched, width).div_(norms[:, None]).view(-1)
    values.copy_(padded[lead : lead + length])
