"""Parts: this rank's slices inside a tensor that an optimizer steps.

DDP and FSDP give one tensor at a time to the optimizer, DeepSpeed a flat partition of many tensors
that `groups.join` has joined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seer_scale.optim.slices import extent, local


@dataclass(frozen=True)
class Part:
    """This rank's slice of a tensor, as a run of elements of the tensor that is stepped.

    Attributes:
        tensor: settings of the slice's tensor: `name`, `shape`, `lr`, `frozen` and the others.
        holder: tensor that is stepped and holds the slice.
        start: number of elements of the holder before the slice.
        offset: number of elements of the whole tensor before the slice.
        length: number of elements of the slice, without padding; perhaps 0.
    """

    tensor: dict[str, Any]
    holder: Tensor
    start: int
    offset: int
    length: int

    def of(self, values: Tensor | None) -> Tensor:
        """Returns the flat view [length] of `values`, which has the shape of the holder."""
        assert values is not None
        return local(values).view(-1)[self.start : self.start + self.length]


def parts_of(group: dict[str, Any], holder: Tensor, rank: int, shards: int) -> list[Part]:
    """Lists the parts of a parameter group, one per tensor and in the same order on every rank.

    Args:
        group: from `parameter_groups` or `join`.
        holder: this rank's tensor of the group.
        rank: rank of this process among the shards.
        shards: number of ranks that hold one part each.
    """
    if "tensors" not in group:
        return [Part(group, holder, 0, *extent(holder, group["shape"], rank, shards))]
    sizes = [math.prod(tensor["shape"]) for tensor in group["tensors"]]
    cut = _cut_then_joined if group["cut_first"] else _joined_then_cut
    return [
        Part(tensor, holder, *where)
        for tensor, where in zip(
            group["tensors"], cut(sizes, holder.numel(), rank, shards), strict=True
        )
    ]


def _joined_then_cut(
    sizes: Sequence[int], held: int, rank: int, shards: int
) -> list[tuple[int, int, int]]:
    """Start, offset and length of each tensor in a part of `held` elements of all, end to end."""
    first, found, position = rank * held, [], 0
    for size in sizes:
        begin, end = max(position, first), min(position + size, first + held)
        length = max(0, end - begin)
        found.append((begin - first, begin - position, length) if length else (0, 0, 0))
        position += size
    return found


def _cut_then_joined(
    sizes: Sequence[int], held: int, rank: int, shards: int
) -> list[tuple[int, int, int]]:
    """The same where each tensor is cut into equal parts, filled up, and the parts are joined."""
    found, start = [], 0
    for size in sizes:
        share = -(-size // shards)
        length = max(0, min(share, size - rank * share))
        found.append((start, rank * share if length else 0, length))
        start += share
    assert start == held, "the partition has another size than its tensors"
    return found


def cut_pieces(pieces: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    """Cuts what stands in consecutive pieces at the borders of `parts`, which are in order.

    A part that lies in one piece, the usual case, is a view; one of several pieces is a copy.

    Args:
        pieces: tensors that make up a tensor like the holder, end to end.
        parts: parts of one holder.

    Returns:
        a flat tensor [length] for each part.
    """
    flat = [piece.view(-1) for piece in pieces]
    ends: list[int] = []
    for piece in flat:
        ends.append((ends[-1] if ends else 0) + piece.numel())
    found, index = [], 0
    for part in parts:
        while part.length and ends[index] <= part.start:
            index += 1
        chunks, position, last = [], part.start, part.start + part.length
        at = index
        while position < last:
            begin = ends[at] - flat[at].numel()
            stop = min(last, ends[at])
            chunks.append(flat[at][position - begin : stop - begin])
            position, at = stop, at + 1
        found.append(chunks[0] if len(chunks) == 1 else torch.cat(chunks or [flat[0][:0]]))
    return found
