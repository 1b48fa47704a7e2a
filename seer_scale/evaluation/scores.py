"""Numbers that say how good predictions are: top-k shares, confusion, average precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LEVELS = np.linspace(0, 1, 11)  # of recall, in VOC 2007's average precision


def top_share(scores: Tensor, targets: Tensor, k: int) -> float:
    """Share of rows whose class is among the k highest of `scores` [N, classes].

    Of equal scores the lower class comes first.
    """
    own = scores.gather(1, targets[:, None])  # [N, 1]
    ahead = (scores > own).sum(1)
    classes = torch.arange(scores.shape[1], device=scores.device)
    ahead += ((scores == own) & (classes < targets[:, None])).sum(1)
    return float((ahead < k).double().mean())


def confusion(targets: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Counts int64 [classes, classes] by true class (row) and predicted one (column)."""
    cells = torch.bincount(targets * classes + predictions, minlength=classes**2)
    return cells.view(classes, classes)


def per_class(matrix: Tensor, classes: list[str]) -> dict[str, Any]:
    """Share of each class that was recognised; None for a class without images."""
    counts = matrix.sum(1).tolist()
    right = matrix.diagonal().tolist()
    return {
        name: right[number] / counts[number] if counts[number] else None
        for number, name in enumerate(classes)
    }


def average_precision(relevant: NDArray[np.bool_], scores: NDArray[np.floating[Any]]) -> float:
    """Area under the precision-recall steps: the mean precision at each rise of recall.

    Items of equal score come together, so that their order does not matter (scikit-learn's
    definition).

    Args:
        relevant: [N], of which at least one is true.
        scores: [N], higher first.
    """
    precision, recall = _curve(relevant, scores)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def average_precision_11_points(
    relevant: NDArray[np.bool_], scores: NDArray[np.floating[Any]]
) -> float:
    """VOC 2007's: the mean over recalls 0, 0.1 ... 1 of the best precision at that recall or more.

    Args:
        relevant: [N], of which at least one is true.
        scores: [N], higher first.
    """
    precision, recall = _curve(relevant, scores)
    # A recall that is a level but for rounding reaches it.
    best = [precision[recall >= level - 1e-9].max(initial=0.0) for level in _LEVELS]
    return float(np.mean(best))


def average_precision_trapezoid(
    relevant: NDArray[np.bool_], scores: NDArray[np.floating[Any]]
) -> float:
    """The image-retrieval sets' own (Oxford, Paris, Holidays): trapezoids instead of steps.

    Each relevant item adds the mean of the precision just before it and at it; the first item of
    all has precision 1 before it.

    Args:
        relevant: [N], of which at least one is true.
        scores: [N], higher first; of equal ones the earlier is first.
    """
    order = np.argsort(-scores, kind="stable")
    ranks = np.flatnonzero(relevant[order])
    found = np.arange(len(ranks))
    before = np.where(ranks > 0, found / np.maximum(ranks, 1), 1.0)
    return float(np.mean((before + (found + 1) / (ranks + 1)) / 2))


def _curve(
    relevant: NDArray[np.bool_], scores: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall after each distinct score, highest first."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    hits = np.cumsum(relevant[order])[ends]
    return hits / (ends + 1), hits / hits[-1]
