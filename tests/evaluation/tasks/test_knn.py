"""Weighted kNN against slow loops and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from seer_scale.evaluation.datasets.labelled import open_labelled
from seer_scale.evaluation.feature_store import BLOCK, StoredFeatures, block_path, stored_features
from seer_scale.evaluation.tasks import knn
from seer_scale.evaluation.tasks.knn import _nearest_of_all, knn_top1
from tests.evaluation.contexts import context


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


def at_angles(folder: Path, steps: Tensor, count: int) -> StoredFeatures:
    """Features of two numbers, of any length, at angles of `steps` / `count` of a circle."""
    angles = 2 * math.pi * steps / count
    length = 1 + 9 * torch.rand(len(steps), 1, generator=torch.Generator().manual_seed(2))
    rows = (torch.stack([angles.cos(), angles.sin()], dim=1) * length).float().numpy()
    folder.mkdir()
    for number in range(-(-len(rows) // BLOCK)):
        np.save(block_path(folder, number), rows[number * BLOCK : (number + 1) * BLOCK])
    return StoredFeatures(folder, len(rows), 2)


def test_neighbours_in_every_block_of_a_bank_are_those_of_the_smallest_angles(
    tmp_path: Path,
) -> None:
    count, asked, k = 2 * BLOCK + 88, BLOCK + 44, 5  # three blocks and two
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(count, generator=generator).double()
    # Near the third part of a step: the angles of two neighbours differ by a third of a step.
    queries = torch.randint(0, count, (asked,), generator=generator).double() + 0.3
    bank = at_angles(tmp_path / "bank", places, count)
    cosines, numbers = _nearest_of_all(
        bank, at_angles(tmp_path / "queries", queries, count), k, torch.device("cpu")
    )
    away = (queries[:, None] - places).abs()
    away = torch.minimum(away, count - away)  # [queries, bank], in steps
    expected = away.argsort(dim=1)[:, :k]
    assert torch.equal(numbers, expected)
    steps = away.gather(1, expected)
    torch.testing.assert_close(cosines, (2 * math.pi / count * steps).cos().float())


def test_every_setting_of_a_sweep_is_its_own(few_shapes: Path, tmp_path: Path) -> None:
    said: list[str] = []
    own, data = context(few_shapes, tmp_path), open_labelled(str(few_shapes))
    own = replace(own, say=said.append)
    settings = [(k, temperature) for temperature in (0.005, 1.0) for k in (1, 10, 96)]
    result = knn.run(own, knn.Options(k=[1, 10, 96], temperature=[0.005, 1.0], size=32))
    bank, queries = (
        stored_features(own, part, size=32)["avgpool"].all().double()
        for part in (data.train, data.val)
    )
    expected = [
        slow_knn(bank, data.train.targets, queries, data.val.targets, k, temperature)
        for k, temperature in settings
    ]
    sweep = result.details["sweep"]
    assert "to choose beforehand, give one of each, such as k=[20] temperature=[0.07]" in said[-1]
    assert [(row["k"], row["temperature"]) for row in sweep] == settings
    assert [row["top1"] for row in sweep] == expected
    assert len(set(expected)) >= 3  # settings that change nothing would tell nothing
    assert result.metrics["top1"] == max(row["top1"] for row in sweep)
    # The choice is an advantage, and is told; a single setting chooses nothing.
    assert "the best of 6 settings on the validation images themselves" in said[-1]
    said.clear()
    knn.run(own, knn.Options(k=[1], temperature=[1.0], size=32))
    assert not any("settings" in line for line in said)
