import itertools
import time

import numpy as np
import pytest
from scipy.stats import chi2

from seer_scale.data.order import epoch_key, permute, rank_positions, sample_at, sample_rng


def order(size, seed=0, epoch=0):
    return [sample_at(epoch * size + i, size=size, seed=seed)[1] for i in range(size)]


@pytest.mark.parametrize("size", [*range(1, 51), 1000])
def test_permutation_is_a_bijection(size):
    for epoch in range(3):
        assert sorted(order(size, seed=7, epoch=epoch)) == list(range(size))


def test_epochs_and_seeds_give_unrelated_orders():
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
def test_every_place_is_equally_likely(size):
    """Chi-square over where one position lands; p < 1e-6 would be a biased shuffle."""
    keys, counts = 200 * size, np.zeros((size, size))
    for epoch in range(keys):
        for position in range(size):
            counts[position, permute(position, size, epoch_key(11, epoch))] += 1
    statistics = ((counts - 200) ** 2 / 200).sum(1)
    assert chi2.sf(statistics, size - 1).min() > 1e-6


@pytest.mark.parametrize("size", [7, 10, 13])
@pytest.mark.parametrize("gap", [1, 2])
def test_every_pair_of_places_is_equally_likely(size, gap):
    expected = 100
    counts = np.zeros((size, size))
    for epoch in range(expected * size * (size - 1)):
        key = epoch_key(11, epoch)
        counts[permute(0, size, key), permute(gap, size, key)] += 1
    off_diagonal = counts[~np.eye(size, dtype=bool)]
    assert counts.trace() == 0
    statistic = ((off_diagonal - expected) ** 2 / expected).sum()
    assert chi2.sf(statistic, off_diagonal.size - 1) > 1e-6


def test_a_billion_samples_cost_nothing():
    start = time.perf_counter()
    seen = {sample_at(10**9 + i, size=10**9, seed=0) for i in range(1000)}
    assert time.perf_counter() - start < 1
    assert len(seen) == 1000
    assert all(epoch == 1 and 0 <= index < 10**9 for epoch, index in seen)


def test_index_outside_is_refused():
    with pytest.raises(ValueError, match=r"range\(5\)"):
        permute(5, 5, epoch_key(0, 0))


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "accumulation"),
    [(1, 12, 1), (1, 4, 3), (2, 6, 1), (2, 3, 2), (3, 2, 2), (3, 4, 1), (4, 3, 1), (4, 1, 3)],
)
def test_every_world_reads_the_same_global_batches(world_size, micro_batch_size, accumulation):
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


def test_sample_streams_differ_and_repeat():
    draws = {
        key: tuple(sample_rng(*key).random(4))
        for key in itertools.product((0, 1), (0, 1, 2), (0, 1, 10**9))
    }
    assert len(set(draws.values())) == len(draws)
    assert tuple(sample_rng(1, 2, 10**9).random(4)) == draws[1, 2, 10**9]
