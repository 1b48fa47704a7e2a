"""Which sample stands at which position of the endless training stream, and who reads it.

Everything is a pure function of (seed, position): no state, no shuffled list, no rank or worker.
So every world size reads the same global batches, and resuming needs one integer. The shuffle is a
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

import numpy as np

Key = tuple[int, ...]
"""Round keys of one permutation, 64 bits each."""

_WORD = (1 << 64) - 1


@lru_cache(maxsize=8)
def epoch_key(seed: int, epoch: int) -> Key:
    """Eight independent round keys: the 64 bytes of one BLAKE2b digest."""
    return struct.unpack("<8Q", blake2b(f"seer-scale order {seed} {epoch}".encode()).digest())


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


def sample_at(position: int, *, size: int, seed: int) -> tuple[int, int]:
    """`(epoch, index)` of the sample at `position`, counted since the start of training.

    Every epoch holds each of the `size` samples once, in an order of its own.
    """
    epoch, offset = divmod(position, size)
    return epoch, permute(offset, size, epoch_key(seed, epoch))


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


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator that augments sample `index` in `epoch`, wherever that happens.

    Philox is counter-based: seed as key, epoch and index in the upper words of the counter, so
    that streams of different samples never overlap.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=epoch << 192 | index << 128))
