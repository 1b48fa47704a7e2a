"""Scores against scikit-learn, slow loops and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, top_k_accuracy_score

from seer_scale.evaluation.scores import (
    average_precision,
    average_precision_11_points,
    average_precision_trapezoid,
    confusion,
    per_class,
    top_share,
)


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    relevant = rng.random(60) < 0.3
    relevant[0] = True
    scores = rng.normal(size=60) + relevant
    if seed % 2:
        scores = scores.round(0)  # many ties
    expected = average_precision_score(relevant, scores)
    assert average_precision(relevant, scores) == pytest.approx(expected, abs=1e-12)


def test_eleven_points_and_trapezoids_by_hand() -> None:
    relevant = np.array([True, False, True, False])
    scores = np.array([4.0, 3.0, 2.0, 1.0])
    # Precision 1 up to recall 1/2, then 2/3: six levels of the eleven are at 0.5 or below.
    assert average_precision_11_points(relevant, scores) == pytest.approx((6 + 5 * 2 / 3) / 11)
    # First hit: (1 + 1) / 2; second: precision 1/2 just before, 2/3 at it.
    expected = (1 + (1 / 2 + 2 / 3) / 2) / 2
    assert average_precision_trapezoid(relevant, scores) == pytest.approx(expected)
    late = np.array([False, True])
    assert average_precision_trapezoid(late, np.array([2.0, 1.0])) == pytest.approx(1 / 4)
    assert average_precision(late, np.array([2.0, 1.0])) == pytest.approx(1 / 2)


@pytest.mark.parametrize("seed", range(5))
def test_eleven_points_equal_a_slow_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    relevant = rng.random(50) < 0.4
    scores = rng.permutation(50).astype(float) + 10.5 * relevant
    order = sorted(range(50), key=lambda item: -scores[item])
    points = []
    for level in range(11):
        best, hits = 0.0, 0
        for rank, item in enumerate(order, start=1):
            hits += bool(relevant[item])
            if 10 * hits >= level * relevant.sum():
                best = max(best, hits / rank)
        points.append(best)
    assert average_precision_11_points(relevant, scores) == pytest.approx(sum(points) / 11)


def test_perfect_and_worst() -> None:
    relevant = np.array([True] * 3 + [False] * 3)
    best, worst = np.arange(6)[::-1].astype(float), np.arange(6).astype(float)
    for score in (average_precision, average_precision_11_points, average_precision_trapezoid):
        assert score(relevant, best) == pytest.approx(1.0)
        assert score(relevant, worst) < 0.6


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_share_is_scikit_learns(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(80, 6, generator=generator)
    targets = torch.randint(0, 6, (80,), generator=generator)
    expected = top_k_accuracy_score(targets, scores, k=k, labels=range(6))
    assert top_share(scores, targets, k) == pytest.approx(expected)


def test_equal_scores_do_not_make_everything_right() -> None:
    assert top_share(torch.zeros(4, 4), torch.arange(4), 1) == 0.25
    assert top_share(torch.zeros(4, 4), torch.arange(4), 3) == 0.75
    assert top_share(torch.zeros(2, 2), torch.arange(2), 5) == 1.0


def test_confusion_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    targets, predictions = torch.randint(0, 5, (2, 200), generator=generator)
    matrix = confusion(targets, predictions, 7)
    expected = confusion_matrix(targets, predictions, labels=range(7))
    assert matrix.tolist() == expected.tolist()
    shares = per_class(matrix, list("abcdefg"))
    assert shares["a"] == expected[0, 0] / expected[0].sum()
    assert shares["g"] is None
