"""Fills tensors with their values: a rank reads the part that it holds, and no more.

Of a tensor that every rank holds whole, each rank reads a share, and all gather the shares. So a
checkpoint is read once by all ranks together, and not once by each. The share of a rank is the part
that it would hold if the tensor were cut into equal parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from seer_scale import distributed
from seer_scale.optim.slices import Values, extent, local

BUCKET_BYTES = 64 << 20  # that are gathered at once


class _Piece(NamedTuple):
    """Elements `low` to `high` of the share of every rank, of `share` elements, of one tensor."""

    name: str
    tensor: Tensor  # flat
    share: int
    low: int
    high: int

    @property
    def bytes(self) -> int:
        return (self.high - self.low) * self.tensor.itemsize

    def range(self, rank: int) -> tuple[int, int]:
        """Elements of the tensor that are this piece's on a rank."""
        end = self.tensor.numel()
        return min(rank * self.share + self.low, end), min(rank * self.share + self.high, end)


@torch.no_grad()
def fill(
    model: nn.Module,
    values: Values,
    names: dict[Tensor, str] | None = None,
    *,
    recurse: bool = True,
) -> None:
    """Fills this rank's part of every parameter and buffer of `model` with its value, in place.

    Every rank calls this function. Tensors that all ranks hold whole are filled by all together.

    Args:
        model: a model with memory; its parameters are whole tensors or DTensors.
        values: where values come from.
        names: names of the tensors in the whole model, if `model` is a part of a model.
        recurse: fill the modules inside of `model` too.

    Raises:
        ValueError: if a tensor has no memory on this rank.
    """
    whole: list[tuple[str, Tensor]] = []
    tensors = [*model.named_parameters(recurse=recurse), *model.named_buffers(recurse=recurse)]
    for own, tensor in tensors:
        name = own if names is None else names[tensor]
        part = local(tensor)
        if part.is_meta:
            raise ValueError(f"{name} has no memory to fill: materialise it first (to_empty)")
        if not isinstance(tensor, DTensor):
            whole.append((name, part))
            continue
        offset, length = extent(tensor, tuple(tensor.shape), 0, 1)
        if length:
            part.copy_(values(name, offset, offset + length).view(part.shape))
    fill_together(whole, values)


@torch.no_grad()
def fill_together(tensors: Iterable[tuple[str, Tensor]], values: Values) -> None:
    """Fills tensors in place; every rank calls this with the same names and shapes.

    Args:
        tensors: names and tensors with memory, of any shapes, on any device.
        values: where values come from.
    """
    ranks = distributed.world_size()
    bucket: list[_Piece] = []
    size = 0
    scattered: list[tuple[Tensor, Tensor]] = []  # tensors of another layout, and their values
    for name, tensor in tensors:
        flat = tensor.view(-1) if tensor.is_contiguous() else tensor.new_empty(tensor.numel())
        if not tensor.is_contiguous():
            scattered.append((tensor, flat))
        share = -(-flat.numel() // ranks)
        step = max(1, BUCKET_BYTES // (ranks * flat.itemsize))
        for low in range(0, share, step):
            bucket.append(_Piece(name, flat, share, low, min(low + step, share)))
            size += ranks * bucket[-1].bytes
            if size >= BUCKET_BYTES:
                _gather(bucket, values)
                bucket, size = [], 0
    if bucket:
        _gather(bucket, values)
    for tensor, flat in scattered:
        tensor.copy_(flat.view(tensor.shape))


def _gather(bucket: list[_Piece], values: Values) -> None:
    """Reads this rank's share of the pieces, gathers those of all ranks and puts them in place."""
    rank, ranks = distributed.rank(), distributed.world_size()
    mine = torch.zeros(sum(piece.bytes for piece in bucket), dtype=torch.uint8)
    at = 0
    for piece in bucket:
        start, stop = piece.range(rank)
        if start < stop:
            read = values(piece.name, start, stop).to(piece.tensor.dtype)
            mine[at : at + read.nbytes] = read.contiguous().view(torch.uint8)
        at += piece.bytes
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    device = "cuda" if on_gpu else bucket[0].tensor.device
    shares = distributed.all_gather(mine.to(device)).view(ranks, -1)
    at = 0
    for piece in bucket:
        own = shares[:, at : at + piece.bytes].clone(memory_format=torch.contiguous_format)
        columns = own.view(piece.tensor.dtype)
        at += piece.bytes
        # Ranks whose elements all exist, at once; then those of the rank at the tensor's end.
        whole = max(0, min(ranks, (piece.tensor.numel() - piece.high) // piece.share + 1))
        width = piece.high - piece.low
        target = piece.tensor.as_strided(
            (whole, width), (piece.share, 1), piece.tensor.storage_offset() + piece.low
        )
        target.copy_(columns[:whole])
        if whole < ranks:
            start, stop = piece.range(whole)
            piece.tensor[start:stop] = columns[whole, : stop - start]
