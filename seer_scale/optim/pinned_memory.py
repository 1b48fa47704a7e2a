"""Pinned host memory for many tensors, without the power of two that each would be rounded up to.

torch takes pinned memory in powers of two (its `CachingHostAllocator`). Each tensor alone would
cost RG-10B's momentum 44 GiB instead of 36, and as much again to a save.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 16  # elements that a tensor's place is a multiple of


def pinned(likes: Sequence[Tensor], *, pin: bool = True) -> list[Tensor]:
    """Takes host memory for tensors like float32 tensors, without values, as views of few buffers.

    Args:
        likes: tensors whose shapes the result has.
        pin: take pinned memory, which needs CUDA.
    """
    buffers, places = plan_buffers([like.numel() for like in likes])
    memory = [torch.empty(size, dtype=torch.float32, pin_memory=pin) for size in buffers]
    return [
        memory[index][start : start + like.numel()].view(like.shape)
        for like, (index, start) in zip(likes, places, strict=True)
    ]


def plan_buffers(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Packs tensors into buffers whose sizes are powers of two, large ones first.

    Args:
        sizes: elements of every tensor.

    Returns:
        Elements of every buffer; for every tensor its buffer and its first element there.
    """
    taken = [-(-size // ALIGNED) * ALIGNED for size in sizes]
    left = sum(taken)
    buffers: list[int] = []
    used: list[int] = []
    places = [(0, 0)] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -taken[i]):
        size = taken[index]
        fitting = [i for i, room in enumerate(buffers) if room - used[i] >= size]
        if not fitting:
            # The largest power of two that the tensors left will fill, or one that holds this one.
            at_least = 1 << max(size - 1, ALIGNED - 1).bit_length()
            buffers.append(max(at_least, 1 << (max(left, 1).bit_length() - 1)))
            used.append(0)
            fitting = [len(buffers) - 1]
        best = min(fitting, key=lambda i: buffers[i] - used[i])
        places[index] = (best, used[best])
        used[best] += size
        left -= size
    return buffers, places
