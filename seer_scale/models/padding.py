"""Zero padding inside a tensor: maps flat runs of the padded tensor to the plain tensor and back.

A dimension of `groups` runs of `real` channels holds each run followed by zeros up to `held`:

    groups=2, real=3, held=4      a b c 0 d e f 0

Removing the zeros keeps the order. So the real elements of any flat run of the padded tensor are
one flat run of the plain tensor, and no index is needed to go from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor


class Axis(NamedTuple):
    """A dimension of `groups` runs of `real` channels, each in a place for `held`."""

    groups: int
    real: int
    held: int


@dataclass(frozen=True)
class Padding:
    """Padding of one tensor: one `Axis` per dimension."""

    axes: tuple[Axis, ...]

    @property
    def held_shape(self) -> tuple[int, ...]:
        """The tensor's shape with padding."""
        return tuple(axis.groups * axis.held for axis in self.axes)

    @property
    def real_shape(self) -> tuple[int, ...]:
        """The tensor's shape without padding."""
        return tuple(axis.groups * axis.real for axis in self.axes)

    def before(self, offset: int) -> int:
        """Counts the real elements before the flat element `offset` of the padded tensor."""
        count = 0
        for level, (held, real) in enumerate(self._levels):
            rest = math.prod(held for held, _ in self._levels[level + 1 :])
            digit, offset = divmod(offset, rest)
            count += min(digit, real) * math.prod(real for _, real in self._levels[level + 1 :])
            if digit >= real:
                break
        return count

    def take_out(self, flat: Tensor, offset: int) -> Tensor:
        """Copies the real elements [m] of `flat` [n], which begins at `offset` of the tensor."""
        real = flat.new_empty(self.before(offset + len(flat)) - self.before(offset))
        start = 0
        for view in _real_views(flat, offset, self._levels):
            real[start : start + view.numel()].view(view.shape).copy_(view)
            start += view.numel()
        return real

    def put_in(self, real: Tensor, offset: int, length: int) -> Tensor:
        """Returns `length` elements from `offset` on: those of `real` [m], zeros between."""
        flat = real.new_zeros(length)
        start = 0
        for view in _real_views(flat, offset, self._levels):
            view.copy_(real[start : start + view.numel()].view(view.shape))
            start += view.numel()
        return flat

    @cached_property
    def _levels(self) -> tuple[tuple[int, int], ...]:
        """(held, real) sizes, outermost first: for each axis the groups, then the channels."""
        return tuple(
            level
            for axis in self.axes
            for level in ((axis.groups, axis.groups), (axis.held, axis.real))
        )


def _real_views(flat: Tensor, offset: int, levels: tuple[tuple[int, int], ...]) -> Iterator[Tensor]:
    """Yields strided views of the real elements of `flat`, in order: few, whatever the length.

    First the rest of the item of `levels[0]` in which `offset` lies, then whole items, then the
    beginning of the last item.
    """
    (_, real), inner = levels[0], levels[1:]
    if not inner:
        yield flat[: max(0, real - offset)]
        return
    size = math.prod(held for held, _ in inner)
    item, into = divmod(offset, size)
    head = min(-into % size, len(flat))
    if head and item < real:
        yield from _real_views(flat[:head], into, inner)
    item, flat = item + (into > 0), flat[head:]
    whole, tail = divmod(len(flat), size)
    count = max(0, min(whole, real - item))
    if count:
        items = flat[: count * size].view(count, *(held for held, _ in inner))
        yield items[(slice(None), *(slice(real) for _, real in inner))]
    if tail and item + whole < real:
        yield from _real_views(flat[whole * size :], 0, inner)
