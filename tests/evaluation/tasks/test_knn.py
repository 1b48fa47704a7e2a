"""Weighted kNN against slow loops and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seer_scale.evaluation.tasks.knn import knn_top1


def slow_knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int,
    temperature: float,
) -> float:
    right = 0
    for query, label in zip(queries.tolist(), query_labels.tolist(), strict=True):
        neighbours = []
        for feature, neighbour in zip(bank.tolist(), bank_labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, feature, strict=True))
            neighbours.append((dot / math.hypot(*query) / math.hypot(*feature), neighbour))
        neighbours.sort(reverse=True)
        votes: dict[int, float] = {}
        for cosine, neighbour in neighbours[:k]:
            votes[neighbour] = votes.get(neighbour, 0.0) + math.exp(cosine / temperature)
        right += max(votes, key=lambda c: votes[c]) == label
    return right / len(queries)


@pytest.mark.parametrize("k", [1, 3, 20, 1000])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_slow_loops(k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(k)
    bank = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    queries = torch.randn(50, 6, generator=generator, dtype=torch.float64) * 10
    labels = torch.randint(0, 4, (60,), generator=generator)
    # Classes that the features say something about, so that the figure is not mere chance.
    bank[:, :4] += 1.5 * torch.eye(4, dtype=torch.float64)[labels]
    truth = torch.randint(0, 4, (50,), generator=generator)
    queries[:, :4] += 15 * torch.eye(4, dtype=torch.float64)[truth]
    expected = slow_knn(bank, labels, queries, truth, k, temperature)
    assert knn_top1(bank, labels, queries, truth, k=k, temperature=temperature) == expected
    assert 0.25 < expected < 1 or k == 1000


BANK = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
LABELS = torch.tensor([0, 1, 2])


def test_each_feature_finds_itself_whatever_its_length() -> None:
    assert knn_top1(BANK, LABELS, BANK * 7, LABELS, k=1) == 1.0
    assert knn_top1(BANK, LABELS, -BANK[[0, 2]], torch.tensor([2, 0]), k=1) == 1.0
    assert knn_top1(BANK, LABELS, BANK, LABELS.roll(1), k=1) == 0.0


def test_one_near_neighbour_outweighs_two_far_ones_unless_the_temperature_is_high() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    near, far = torch.tensor([0]), torch.tensor([1])
    assert knn_top1(bank, labels, query, near, k=3, temperature=0.07) == 1.0
    assert knn_top1(bank, labels, query, far, k=3, temperature=10.0) == 1.0
    assert knn_top1(bank, labels, query, near, k=1, temperature=10.0) == 1.0


def test_more_neighbours_than_there_are_means_all() -> None:
    query = torch.tensor([[1.0, 0.1]])
    for k in (3, 4, 10_000):
        assert knn_top1(BANK, LABELS, query, torch.tensor([0]), k=k) == 1.0


def test_a_class_that_the_bank_lacks_is_never_right() -> None:
    assert knn_top1(BANK, LABELS, BANK, torch.tensor([0, 1, 9]), k=1) == pytest.approx(2 / 3)


def test_ties_are_decided_the_same_way_every_time() -> None:
    bank = torch.ones(40, 4)  # every vote weighs the same, every class has ten
    labels = torch.arange(40) % 4
    queries = torch.ones(4, 4)
    truth = torch.arange(4)
    figures = {knn_top1(bank, labels, queries, truth, k=40) for _ in range(5)}
    assert figures == {0.25}  # one class, the same for every query
    chosen = [c for c in range(4) if knn_top1(bank, labels, queries[:1], truth[c : c + 1], k=40)]
    assert chosen == [0]  # the first
    halves = {knn_top1(bank, labels, queries, truth, k=7) for _ in range(5)}
    assert len(halves) == 1
