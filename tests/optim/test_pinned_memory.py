"""Pinned memory by the sizes asked for: a CPU cannot pin, but it can count."""

from __future__ import annotations

import random

import pytest
import torch

from seer_scale.models import build_trunk
from seer_scale.optim.pinned_memory import pinned, plan_buffers


def rounded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def rg10b(ranks: int) -> list[int]:
    """Elements of a rank's rows of every tensor, as FSDP cuts them."""
    trunk = build_trunk("rg_10b", device=torch.device("meta"))
    return [-(-p.shape[0] // ranks) * p[0].numel() for p in trunk.parameters()]


@pytest.mark.parametrize("ranks", [1, 8])
def test_momenta_of_rg10b_take_hardly_more_than_their_bytes(ranks: int) -> None:
    sizes = rg10b(ranks)
    buffers, _ = plan_buffers(sizes)
    assert all(size == rounded(size) for size in buffers)  # so that torch adds nothing
    assert sum(buffers) < 1.02 * sum(sizes)
    assert sum(map(rounded, sizes)) > 1.15 * sum(sizes)  # each alone


@pytest.mark.parametrize("seed", range(20))
def test_no_two_tensors_share_an_element(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice([0, 1, 15, 16, 17, draw.randrange(1, 10_000)]) for _ in range(50)]
    buffers, places = plan_buffers(sizes)
    free = [torch.ones(size, dtype=torch.bool) for size in buffers]
    for size, (index, start) in zip(sizes, places, strict=True):
        assert start % 16 == 0
        room = free[index][start : start + size]
        assert len(room) == size
        assert room.all()
        room[:] = False


def test_tensors_have_the_shapes_and_share_buffers() -> None:
    likes = [torch.ones(3, 4), torch.ones(5), torch.ones(0), torch.ones(())]
    found = pinned(likes, pin=False)
    assert [tensor.shape for tensor in found] == [like.shape for like in likes]
    for index, tensor in enumerate(found):
        tensor.fill_(index)
    assert all(torch.all(tensor == index) for index, tensor in enumerate(found))
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) < len(likes)
