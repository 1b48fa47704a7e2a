"""The order of the stream: every image once an epoch, the same for every world size."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

from harness.jobs import ROOT
from seer_scale.data.order import (
    Order,
    order_key,
    permute,
    permute_all,
    rank_positions,
    sample_rng,
)


def indices(order: Any, start: Any, count: Any) -> Any:
    return [order.index(order.place(position)) for position in range(start, start + count)]


def order(size: Any, seed: Any = 0, epoch: Any = 0) -> Any:
    return indices(Order(np.array([size]), seed=seed), epoch * size, size)


@pytest.mark.parametrize("size", [*range(1, 51), 1000])
def test_permutation_is_a_bijection(size: Any) -> None:
    for epoch in range(3):
        assert sorted(order(size, seed=7, epoch=epoch)) == list(range(size))


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    size = 1000
    orders = [order(size, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        # Two unrelated permutations share one fixed place on average (Poisson: > 8 in 1e-6).
        assert sum(a == b for a, b in zip(one, other, strict=True)) <= 8
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(size)
    for one in orders:
        neighbours = sum(b - a == 1 for a, b in itertools.pairwise(one))
        assert neighbours <= 8


@pytest.mark.parametrize("size", [2, 3, 5, 6, 10, 37])
def test_every_place_is_equally_likely(size: Any) -> None:
    """Chi-square over where one position lands; p < 1e-6 would be a biased shuffle."""
    keys, counts = 200 * size, np.zeros((size, size))
    for epoch in range(keys):
        for position in range(size):
            counts[position, permute(position, size, order_key(11, epoch))] += 1
    statistics = ((counts - 200) ** 2 / 200).sum(1)
    assert chi2.sf(statistics, size - 1).min() > 1e-6


@pytest.mark.parametrize("size", [7, 10, 13])
@pytest.mark.parametrize("gap", [1, 2])
def test_every_pair_of_places_is_equally_likely(size: Any, gap: Any) -> None:
    expected = 100
    counts = np.zeros((size, size))
    for epoch in range(expected * size * (size - 1)):
        key = order_key(11, epoch)
        counts[permute(0, size, key), permute(gap, size, key)] += 1
    off_diagonal = counts[~np.eye(size, dtype=bool)]
    assert counts.trace() == 0
    statistic = ((off_diagonal - expected) ** 2 / expected).sum()
    assert chi2.sf(statistic, off_diagonal.size - 1) > 1e-6


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 1000, 4097])
def test_permuting_all_at_once_is_permuting_one_by_one(size: Any) -> None:
    key = order_key("all", size)
    assert permute_all(size, key).tolist() == [permute(i, size, key) for i in range(size)]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("sizes", [[5], [3, 0, 4, 1, 6, 2], [0, 0, 2], [7] * 9])
def test_an_epoch_holds_every_sample_once(sizes: Any, window: Any) -> None:
    stream = Order(np.array(sizes), seed=1, version="v", window=window)
    total = sum(sizes)
    assert len(stream) == total
    epochs = [indices(stream, epoch * total, total) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    if total > 7:
        assert epochs[0] != epochs[1] != epochs[2]


def test_a_window_holds_its_shards_only() -> None:
    sizes = np.array([20, 30, 10, 40, 25, 5, 15])
    first = np.concatenate([[0], sizes.cumsum()])
    stream = Order(sizes, seed=2, window=3)
    shards = np.searchsorted(first, indices(stream, 0, int(sizes.sum())), side="right") - 1
    end = 0
    seen: set[int] = set()
    while end < len(shards):
        size = stream.window_size(stream.place(end))
        within = set(shards[end : end + size].tolist())
        assert len(within) == min(3, len(sizes) - len(seen))
        assert not within & seen
        assert size == sizes[list(within)].sum()
        seen |= within
        end += size
    assert seen == set(range(len(sizes)))


def test_skipping_goes_round_the_window() -> None:
    stream = Order(np.array([4, 6, 5, 9]), seed=3, window=2)
    for position in range(24):
        place = stream.place(position)
        size = stream.window_size(place)
        around = [stream.index(place, skip) for skip in range(size)]
        begin = position - place.rank
        assert sorted(around) == sorted(indices(stream, begin, size))
        assert stream.index(place, size) == around[0] == indices(stream, position, 1)[0]


def test_another_version_seed_or_epoch_goes_through_the_shards_in_another_order() -> None:
    """Windows of one shard of one image, so that the order is that of the shards alone."""

    def shards(seed: int, version: str, epoch: int) -> tuple[int, ...]:
        order = Order(np.ones(40, np.int64), seed=seed, version=version, window=1)
        return tuple(order.index(order.place(40 * epoch + place)) for place in range(40))

    found = [shards(0, "a", 0), shards(0, "b", 0), shards(1, "a", 0), shards(0, "a", 1)]
    assert all(sorted(order) == list(range(40)) for order in found)
    assert len(set(found)) == 4


def test_another_version_is_shuffled_another_way() -> None:
    orders = [indices(Order(np.array([300]), seed=0, version=v), 0, 300) for v in ("a", "b")]
    assert sum(a == b for a, b in zip(*orders, strict=True)) <= 8


PLACING = """
import time
import numpy as np
from harness.resident import resident_bytes
from seer_scale.data.order import Order
before = resident_bytes("VmHWM")  # not ru_maxrss, which comes from the process that started this
began = time.perf_counter()
order = Order(np.full(100_000, 10_000), seed=0, version="v")
seen = {order.index(order.place(10**9 + 123_456_789 + i)) for i in range(1000)}
assert len(seen) == 1000 and all(0 <= index < 10**9 for index in seen)
seconds = time.perf_counter() - began
print(seconds, (resident_bytes("VmHWM") - before) / 2**20)
"""


def test_the_cursor_is_placed_among_a_billion_samples() -> None:
    """In under a second with under 200 MB: 100,000 shards of 10,000 images."""
    done = subprocess.run([sys.executable, "-c", PLACING], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, mib = map(float, done.stdout.split())
    assert seconds < 1
    assert mib < 200


def test_index_outside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"range\(5\)"):
        permute(5, 5, order_key(0, 0))


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "accumulation"),
    [(1, 12, 1), (1, 4, 3), (2, 6, 1), (2, 3, 2), (3, 2, 2), (3, 4, 1), (4, 3, 1), (4, 1, 3)],
)
def test_every_world_reads_the_same_global_batches(
    world_size: Any, micro_batch_size: Any, accumulation: Any
) -> None:
    steps, first = 3, 24
    ranks = [
        rank_positions(
            first,
            micro_batch_size=micro_batch_size,
            gradient_accumulation=accumulation,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for step in range(steps):
        # micro-batch by micro-batch, rank by rank: the stream itself, in order
        batch = [p for _ in range(accumulation) for rank in ranks for p in next(rank)]
        assert batch == list(range(first + 12 * step, first + 12 * (step + 1)))


def test_sample_streams_differ_and_repeat() -> None:
    keys = list(itertools.product((0, 1), (0, 1, 2, 10**9, 10**13)))
    draws = {key: tuple(sample_rng(*key).random(4)) for key in keys}
    assert len(set(draws.values())) == len(draws)
    assert tuple(sample_rng(1, 10**9).random(4)) == draws[1, 10**9]


def test_streams_of_neighbouring_samples_do_not_overlap() -> None:
    # A counter that neighbours share would give one the other's numbers four places further on.
    drawn = np.concatenate([sample_rng(0, position).random(1000) for position in range(8)])
    assert len(np.unique(drawn)) == len(drawn)


def test_the_stream_of_a_sample_is_the_one_of_earlier_versions() -> None:
    # Computed apart: ten rounds of Philox4x64 (Random123), whose known answers the computation
    # gives, on key [7, 0] and counter [1, 0, 3, 0], since numpy counts before it draws.
    assert sample_rng(7, 3).random(2).tolist() == [0.7545134190860097, 0.976164072590892]
