"""ZeRO 3's reduction and gathering against DeepSpeed's own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.pool import Distributed
from seer_scale import distributed as ranks
from seer_scale.parallel.zero_collectives import reduce_scatter_mean, whole_tensors

# Fewer elements than ranks, not divisible, divisible, with dimensions.
SHAPES = [(1,), (7,), (12,), (5, 3, 2, 2)]


def tensors_of(rank: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def both_ways(shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's parts: ours, and DeepSpeed's."""
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    from seer_scale.parallel.zero import _deepspeed

    _deepspeed()
    ours = reduce_scatter_mean(tensors_of(ranks.rank(), shapes))
    theirs = reduce_scatter_coalesced(tensors_of(ranks.rank(), shapes))
    return [part.clone() for part in ours], [part.clone() for part in theirs]


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[2:3], SHAPES[:1]])
def test_means_are_those_of_deepspeed(
    distributed: Distributed, shapes: list[tuple[int, ...]]
) -> None:
    world = 2
    per_rank = distributed(both_ways, world, shapes)
    for ours, theirs in per_rank:
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
    for index in range(len(shapes)):
        mean = sum(tensors_of(rank, shapes)[index].double() for rank in range(world)) / world
        joined = torch.cat([ours[index] for ours, _ in per_rank])
        torch.testing.assert_close(joined.double(), torch.as_tensor(mean).view(-1))


@pytest.mark.parametrize("world", [1, 2, 3, 64])
def test_gathered_parts_are_put_together_in_order(world: int) -> None:
    wholes = tensors_of(0, SHAPES)
    rows = []
    for rank in range(world):
        row = []
        for whole in wholes:
            share = -(-whole.numel() // world)
            part = whole.flatten()[rank * share : (rank + 1) * share]
            row.append(torch.cat([part, torch.full((share - len(part),), torch.nan)]))
        rows.append(torch.cat(row))
    found = whole_tensors(torch.stack(rows), [whole.shape for whole in wholes])
    for mine, whole in zip(found, wholes, strict=True):
        assert mine.shape == whole.shape
        assert torch.equal(mine, whole)


@pytest.mark.parametrize("world", [2, 64])
def test_gathered_tensors_do_not_keep_the_parts_alive(world: int) -> None:
    """With as many ranks as elements a part is one element, and a column of the parts a tensor."""
    sizes = [world, 3 * world, world]
    gathered = torch.arange(5.0 * world).view(world, 5)
    found = whole_tensors(gathered, [torch.Size([size]) for size in sizes])
    assert all(tensor.is_contiguous() for tensor in found)
    assert [tensor.untyped_storage().nbytes() for tensor in found] == [4 * size for size in sizes]
