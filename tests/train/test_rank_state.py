"""Random numbers of a rank: its own, and the same in every run of the same seed."""

from __future__ import annotations

import itertools

import torch

from seer_scale.train.rank_state import seed_rank


def drawn(seed: int, rank: int) -> list[float]:
    before = torch.get_rng_state()
    seed_rank(seed, rank)
    values: list[float] = torch.rand(8).tolist()
    torch.set_rng_state(before)
    return values


def test_every_rank_of_every_seed_draws_its_own_numbers() -> None:
    places = list(itertools.product((0, 1, 2), (0, 1, 7)))
    found = [tuple(drawn(seed, rank)) for seed, rank in places]
    assert len(set(found)) == len(places)
    assert [tuple(drawn(seed, rank)) for seed, rank in places] == found
