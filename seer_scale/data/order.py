"""Which sample stands at which position of the endless training stream, and who reads it.

Everything is a pure function of (seed, version of the collection, position): no state, no shuffled
list, no rank or worker. So every world size reads the same global batches, and resuming needs one
integer. An epoch takes the shards in a shuffled order, a window of them at a time, and shuffles the
images of a window: a reader needs few shards at once, and no memory per image. The shuffle is a
format-preserving cipher: a Feistel network on integers with cycle walking (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from math import isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, ...]
"""Round keys of one permutation, 64 bits each."""

_WORD = (1 << 64) - 1


@lru_cache(maxsize=64)
def order_key(*what: int | str) -> Key:
    """Eight independent round keys: the 64 bytes of one BLAKE2b digest."""
    text = " ".join(["seer-scale order", *map(str, what)])
    return struct.unpack("<8Q", blake2b(text.encode()).digest())


def _mix(value: int, key: int) -> int:
    """A 64-bit hash of one half, the round function (multiply-and-shift, as in SplitMix64)."""
    value = ((value ^ key) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def permute(index: int, size: int, key: Key) -> int:
    """The place of `index` in a keyed pseudo-random permutation of `range(size)`.

    Constant memory. `index` is split into a row and a column of a nearly square table; rounds
    add a hash of one half to the other. The table has fewer than sqrt(size) cells too many, and
    an index that lands on one of them walks on until it is back inside. Every pair of places is
    equally likely as far as a test can see, except that six samples or fewer mix less well.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is not in range({size})")
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(index, columns)
        for even, odd in zip(key[::2], key[1::2], strict=True):
            row = (row + _mix(column, even)) % rows
            column = (column + _mix(row, odd)) % columns
        index = row * columns + column
        if index < size:
            return index


def permute_all(size: int, key: Key) -> NDArray[np.int64]:
    """`permute` of every index of `range(size)` at once: `[size]`."""
    if size == 0:
        return np.zeros(0, np.int64)
    rows = np.uint64(isqrt(size - 1) + 1)
    columns = np.uint64(-(-size // int(rows)))
    index = np.arange(size, dtype=np.uint64)
    outside = np.ones(size, dtype=bool)
    while outside.any():
        row, column = np.divmod(index[outside], columns)
        for even, odd in zip(key[::2], key[1::2], strict=True):
            row = (row + _mix_all(column, even) % rows) % rows
            column = (column + _mix_all(row, odd) % columns) % columns
        index[outside] = row * columns + column
        outside = index >= size
    return index.astype(np.int64)


def _mix_all(value: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """`_mix` of an array; its products are modulo 2**64 as they are."""
    value = (value ^ np.uint64(key)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Place(NamedTuple):
    """Where a sample of the stream comes from.

    Attributes:
        window: number of the window of shards within its epoch.
        rank: place among the window's images, in the order of the stream.
    """

    epoch: int
    window: int
    rank: int


class Order:
    """The order of an endless stream over a collection of shards.

    Args:
        shard_sizes: `[S]` images of every shard, in the order in which images are numbered.
        seed: of the shuffle.
        version: of the collection; another one is shuffled another way.
        window: shards whose images are mixed with each other.
    """

    def __init__(
        self, shard_sizes: NDArray[np.int64], *, seed: int, version: str = "", window: int = 16
    ) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first = np.concatenate([[0], self._sizes.cumsum()])  # number of a shard's first image
        self._seed, self._version, self._window = seed, version, window
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        """Images of an epoch."""
        return int(self._first[-1])

    def place(self, position: int) -> Place:
        """The window of the sample at `position`, counted since this collection came into use."""
        epoch, offset = divmod(position, len(self))
        window = int(np.searchsorted(self._epoch(epoch).windows, offset, side="right")) - 1
        return Place(epoch, window, offset - int(self._epoch(epoch).windows[window]))

    def window_size(self, place: Place) -> int:
        """Images in the window of a place."""
        windows = self._epoch(place.epoch).windows
        return int(windows[place.window + 1] - windows[place.window])

    def index(self, place: Place, skip: int = 0) -> int:
        """Number of the image at a place, or `skip` places farther on, around its window."""
        epoch, size = self._epoch(place.epoch), self.window_size(place)
        key = order_key(self._seed, self._version, place.epoch, place.window)
        within = permute((place.rank + skip) % size, size, key)
        offset = int(epoch.windows[place.window]) + within
        at = int(np.searchsorted(epoch.starts, offset, side="right")) - 1
        return int(self._first[epoch.shards[at]]) + offset - int(epoch.starts[at])

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            shards = permute_all(
                len(self._sizes), order_key(self._seed, self._version, epoch, "shards")
            )
            starts = np.concatenate([[0], self._sizes[shards].cumsum()])
            bounds = starts[:: self._window]
            windows = bounds if bounds[-1] == starts[-1] else np.append(bounds, starts[-1])
            if len(self._epochs) > 1:  # two are in use where one ends and the next begins
                self._epochs.pop(min(self._epochs), None)
            found = self._epochs[epoch] = _Epoch(shards, starts, windows)
        return found


class _Epoch(NamedTuple):
    """The shards of an epoch in their order, and where each and where each window begins."""

    shards: NDArray[np.int64]
    starts: NDArray[np.int64]
    windows: NDArray[np.int64]


def rank_positions(
    first_sample: int,
    *,
    micro_batch_size: int,
    gradient_accumulation: int,
    rank: int,
    world_size: int,
) -> Iterator[range]:
    """Positions of every micro-batch that `rank` reads from `first_sample` on, without end.

    One step covers `world_size * micro_batch_size * gradient_accumulation` successive positions;
    each of its micro-batches covers `world_size * micro_batch_size` of them, split by rank.
    """
    across_ranks = world_size * micro_batch_size
    for step_start in itertools.count(first_sample, across_ranks * gradient_accumulation):
        for micro_batch in range(gradient_accumulation):
            start = step_start + micro_batch * across_ranks + rank * micro_batch_size
            yield range(start, start + micro_batch_size)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The generator that augments the sample at `position` of the stream, wherever that happens.

    Philox is counter-based: seed as key, position in the upper words of the counter, so that
    streams of different samples never overlap.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=position << 128))
