"""Joined groups, and the parts of their tensors that a rank holds, element by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seer_scale.optim.groups import join
from seer_scale.optim.parts import cut_pieces, parts_of

SIZES = {"a": (7,), "b": (2, 3), "c": (1,), "d": (4, 5)}


def groups() -> list[dict[str, Any]]:
    return [
        {"params": [nn.Parameter(torch.zeros(shape))], "name": name, "shape": shape, "lr": 0.1}
        for name, shape in SIZES.items()
    ]


def labelled(name: str) -> list[tuple[str, int]]:
    return [(name, index) for index in range(torch.Size(SIZES[name]).numel())]


def as_deepspeed_cuts(rank: int, world: int, cut_first: bool) -> list[tuple[str, int] | None]:
    """Which element of which tensor stands where in a rank's partition; None is padding."""
    if cut_first:  # stage 3: each tensor in equal parts, the parts of a rank end to end
        held: list[tuple[str, int] | None] = []
        for name in SIZES:
            whole: list[tuple[str, int] | None] = [*labelled(name)]
            while len(whole) % world:
                whole.append(None)
            length = len(whole) // world
            held += whole[rank * length : (rank + 1) * length]
        return held
    flat: list[tuple[str, int] | None] = [item for name in SIZES for item in labelled(name)]
    while len(flat) % (2 * world):  # stages 1 and 2: all of them end to end, in equal parts
        flat.append(None)
    length = len(flat) // world
    return flat[rank * length : (rank + 1) * length]


@pytest.mark.parametrize("cut_first", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
def test_every_element_is_in_the_part_that_names_it(world: int, cut_first: bool) -> None:
    (group,) = join(groups(), most=100, cut_first=cut_first)
    seen = []
    for rank in range(world):
        held = as_deepspeed_cuts(rank, world, cut_first)
        parts = parts_of(group, torch.zeros(len(held)), rank, world)
        assert [part.tensor["name"] for part in parts] == list(SIZES)  # the same on every rank
        for part in parts:
            here = held[part.start : part.start + part.length]
            name = part.tensor["name"]
            assert here == labelled(name)[part.offset : part.offset + part.length]
            seen += here
    assert sorted(str(item) for item in seen) == sorted(
        str(item) for name in SIZES for item in labelled(name)
    )


def test_a_tensor_alone_is_cut_the_same_way_with_and_without_joining() -> None:
    for world in (1, 3):
        for rank in range(world):
            for cut_first in (False, True):
                alone = groups()[3]
                (group,) = join([alone], most=0, cut_first=cut_first)
                holder = torch.zeros(20 // world + (world > 1))
                (plain,), (joined,) = (parts_of(g, holder, rank, world) for g in (alone, group))
                assert (plain.start, plain.offset, plain.length) == (
                    joined.start,
                    joined.offset,
                    joined.length,
                )


@pytest.mark.parametrize(
    ("most", "expected"),
    [(0, ["a", "b", "c", "d"]), (7, ["a", "bc", "d"]), (13, ["ab", "c", "d"]), (99, ["abcd"])],
)
def test_no_group_of_several_tensors_is_larger(most: int, expected: list[str]) -> None:
    joined = join(groups(), most=most, cut_first=False)
    names = ["".join(tensor["name"] for tensor in group["tensors"]) for group in joined]
    assert names == expected
    assert [len(group["params"]) for group in joined] == [len(name) for name in expected]
    assert all(tensor["lr"] == 0.1 for group in joined for tensor in group["tensors"])


@pytest.mark.parametrize("cuts", [[], [1], [13], [5, 7], [3, 4, 5, 6, 30], list(range(1, 34))])
def test_pieces_are_cut_where_parts_begin_and_end(cuts: list[int]) -> None:
    (group,) = join(groups(), most=100, cut_first=False)
    flat = torch.arange(34.0)
    pieces: list[Tensor] = list(torch.tensor_split(flat, cuts)) if cuts else [flat]
    parts = parts_of(group, flat, 0, 1)
    found = cut_pieces(pieces, [parts[1], parts[3]])
    assert [piece.tolist() for piece in found] == [
        [float(n) for n in range(7, 13)],
        [float(n) for n in range(14, 34)],
    ]


def test_whole_pieces_are_not_copied() -> None:
    (group,) = join(groups(), most=100, cut_first=False)
    flat = torch.zeros(34)
    (found,) = cut_pieces([flat[:7], flat[7:13], flat[13:]], parts_of(group, flat, 0, 1)[1:2])
    assert found.data_ptr() == flat[7:].data_ptr()
