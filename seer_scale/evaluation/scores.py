"""Measures of how good predictions are: top-k shares, confusion matrix, average precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LEVELS = np.linspace(0, 1, 11)  # levels of recall in VOC 2007's average precision


def top_share(scores: Tensor, targets: Tensor, k: int) -> float:
    """Returns the share of rows whose class is among the k highest of `scores` [N, classes].

    Of classes with equal scores the one with the lower number comes first.
    """
    own = scores.gather(1, targets[:, None])  # [N, 1]
    ahead = (scores > own).sum(1)
    classes = torch.arange(scores.shape[1], device=scores.device)
    ahead += ((scores == own) & (classes < targets[:, None])).sum(1)
    return float((ahead < k).double().mean())


def confusion(targets: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Counts rows by true class (row) and predicted class (column): int64 [classes, classes]."""
    cells = torch.bincount(targets * classes + predictions, minlength=classes**2)
    return cells.view(classes, classes)


def per_class(matrix: Tensor, classes: list[str]) -> dict[str, Any]:
    """Returns the share of each class's images that is right; None for a class without images."""
    counts = matrix.sum(1).tolist()
    right = matrix.diagonal().tolist()
    return {
        name: right[number] / counts[number] if counts[number] else None
        for number, name in enumerate(classes)
    }


def average_precision(relevant: NDArray[np.bool_], scores: NDArray[np.floating[Any]]) -> float:
    """Returns the area under the precision-recall steps: the mean precision over rises of recall.

    Items of equal score count together, so that their order does not matter. This is scikit-learn's
    `average_precision_score`.

    Args:
        relevant: [N], at least one of them true.
        scores: [N]; a higher score ranks an item earlier.
    """
    precision, recall = _curve(relevant, scores)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def average_precision_11_points(
    relevant: NDArray[np.bool_], scores: NDArray[np.floating[Any]]
) -> float:
    """Returns VOC 2007's average precision.

    This is the mean over recalls 0, 0.1 ... 1 of the best precision at that recall or more.

    Args:
        relevant: [N], at least one of them true.
        scores: [N]; a higher score ranks an item earlier.
    """
    precision, recall = _curve(relevant, scores)
    # A recall that equals a level except for rounding reaches that level.
    best = [precision[recall >= level - 1e-9].max(initial=0.0) for level in _LEVELS]
    return float(np.mean(best))


def average_precision_trapezoid(
    relevant: NDArray[np.bool_], scores: NDArray[np.floating[Any]]
) -> float:
    """Returns the average precision of the image-retrieval sets (Oxford, Paris, Holidays).

    The area under the curve consists of trapezoids instead of steps: each relevant item adds the
    mean of the precision just before the item and at the item. Before the first item the precision
    is 1.

    Args:
        relevant: [N], at least one of them true.
        scores: [N]; a higher score ranks an item earlier, of equal scores the first comes first.
    """
    order = np.argsort(-scores, kind="stable")
    ranks = np.flatnonzero(relevant[order])
    found = np.arange(len(ranks))
    before = np.where(ranks > 0, found / np.maximum(ranks, 1), 1.0)
    return float(np.mean((before + (found + 1) / (ranks + 1)) / 2))


def _curve(
    relevant: NDArray[np.bool_], scores: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns precision and recall after each distinct score, highest score first."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    hits = np.cumsum(relevant[order])[ends]
    return hits / (ends + 1), hits / hits[-1]
