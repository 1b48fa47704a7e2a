"""The order of the endless training stream: the sample at each position, and its reader.

The order is a pure function of (seed, version of the collection, position). It has no state and no
shuffled list, and does not depend on ranks or workers. So every world size reads the same global
batches, and a resumed run needs one integer. An epoch goes through the shards in a shuffled order,
a window of shards at a time, and shuffles the images of a window: a reader needs few shards at once
and no memory per image. The shuffle is a format-preserving cipher: a Feistel network on integers
with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
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
"""Round keys of one permutation, of 64 bits each."""

_WORD = (1 << 64) - 1


@lru_cache(maxsize=64)
def order_key(*what: int | str) -> Key:
    """Returns eight independent round keys: the 64 bytes of one BLAKE2b digest."""
    text = " ".join(["seer-scale order", *map(str, what)])
    return struct.unpack("<8Q", blake2b(text.encode()).digest())


def _mix(value: int, key: int) -> int:
    """Hashes one half to 64 bits: the round function, by multiply and shift as in SplitMix64."""
    value = ((value ^ key) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def permute(index: int, size: int, key: Key) -> int:
    """Returns the place of `index` in a keyed pseudo-random permutation of `range(size)`.

    Needs constant memory. `index` is split into a row and a column of a nearly square table; each
    round adds a hash of one half to the other. The table has up to sqrt(size) cells too many; an
    index that lands on one of them repeats the rounds until it is inside `range(size)`. Tests find
    all pairs of places equally likely, except for six samples or fewer, which mix less well.

    Raises:
        ValueError: `index` is not in `range(size)`.
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
    """Permutes all of `range(size)` at once; returns int64 [size]."""
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
    """Hashes an array like `_mix`; uint64 products wrap at 2**64 by themselves."""
    value = (value ^ np.uint64(key)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Place(NamedTuple):
    """Place of a sample within the stream.

    Attributes:
        epoch: number of the epoch.
        window: number of the window of shards within the epoch.
        rank: place among the window's images, in the order of the stream.
    """

    epoch: int
    window: int
    rank: int


class Order:
    """The order of an endless stream over a collection of S shards.

    Args:
        shard_sizes: int64 [S], images of each shard, in the order in which images are numbered.
        seed: seed of the shuffle.
        version: version of the collection; another version gets another order.
        window: number of shards whose images are mixed with each other.
    """

    def __init__(
        self, shard_sizes: NDArray[np.int64], *, seed: int, version: str = "", window: int = 16
    ) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first = np.concatenate([[0], self._sizes.cumsum()])  # number of a shard's first image
        self._seed, self._version, self._window = seed, version, window
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        """Number of images in an epoch."""
        return int(self._first[-1])

    def place(self, position: int) -> Place:
        """Returns the place of `position`, counted since this collection came into use."""
        epoch, offset = divmod(position, len(self))
        window = int(np.searchsorted(self._epoch(epoch).windows, offset, side="right")) - 1
        return Place(epoch, window, offset - int(self._epoch(epoch).windows[window]))

    def window_size(self, place: Place) -> int:
        """Returns the number of images in the window of a place."""
        windows = self._epoch(place.epoch).windows
        return int(windows[place.window + 1] - windows[place.window])

    def index(self, place: Place, skip: int = 0) -> int:
        """Returns the number of the image at a place, or `skip` places on, within its window."""
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
            if len(self._epochs) > 1:  # around the end of an epoch two are in use
                self._epochs.pop(min(self._epochs), None)
            found = self._epochs[epoch] = _Epoch(shards, starts, windows)
        return found


class _Epoch(NamedTuple):
    """The shards of an epoch in order, and the offsets at which shards and windows begin."""

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
    """Yields the positions of each micro-batch of `rank`, from `first_sample` on, without end.

    One step covers `world_size * micro_batch_size * gradient_accumulation` successive positions;
    each of its micro-batches covers `world_size * micro_batch_size` of them, split by rank.
    """
    across_ranks = world_size * micro_batch_size
    for step_start in itertools.count(first_sample, across_ranks * gradient_accumulation):
        for micro_batch in range(gradient_accumulation):
            start = step_start + micro_batch * across_ranks + rank * micro_batch_size
            yield range(start, start + micro_batch_size)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """Returns the random generator of the sample at `position` of the stream.

    Philox is counter-based (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3").
    The seed is its key and the position the upper words of its counter, so that the random numbers
    of different samples never overlap.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=position << 128))
