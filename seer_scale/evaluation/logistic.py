"""Multinomial logistic regression to its optimum: the probe that no learning rate can spoil."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TOLERANCE = 1e-6  # of the gradient's largest entry


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """All in float64, shifted and scaled by the mean and deviation of `train`, column by column."""
    wide = train.double()
    mean, deviation = wide.mean(0), wide.std(0, unbiased=False).clamp(min=1e-8)
    return [(part.double() - mean) / deviation for part in (train, *others)]


def fit_logistic(
    features: Tensor, targets: Tensor, classes: int, *, weight_decay: float, iterations: int = 2000
) -> tuple[Tensor, Tensor]:
    """Minimises mean cross-entropy + weight_decay / 2 * |weight|^2 by L-BFGS, from zero.

    scikit-learn's `LogisticRegression(C=1 / (weight_decay * N))` minimises the same.

    Args:
        features: float64 [N, C].
        targets: int64 [N].
        classes: how many there are.
        weight_decay: of the weight; the bias is free.
        iterations: at most so many.

    Returns:
        Weight [classes, C] and bias [classes], float64.
    """
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), targets)
        loss = loss + weight_decay / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
