"""Multinomial logistic regression, solved to its optimum: a probe without a learning rate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_scale import distributed
from seer_scale.errors import ConfigError
from seer_scale.performance.free_memory import free_memory

_TOLERANCE = 1e-6  # largest entry of the gradient at the optimum
_HISTORY = 20  # steps and gradients that L-BFGS remembers
_LOGITS = 3  # logits, their logarithmic softmax, and the gradient
_VECTORS = 2 * _HISTORY + 12  # like weight and bias: the history, and what a line search keeps


def bytes_needed(train: int, val: int, width: int, classes: int) -> int:
    """Bytes that `predict_logistic` takes for so many images of each part.

    Args:
        train: images to fit on.
        val: images to predict.
        width: numbers in the features of an image.
        classes: number of classes.
    """
    features, logits = (train + val) * width, (_LOGITS * train + val) * classes
    return torch.float64.itemsize * (features + logits + _VECTORS * classes * (width + 1))


def check_logistic(train: int, val: int, width: int, classes: int, instead: str) -> None:
    """Refuses what would not fit into the memory of this machine, before features are computed.

    Args:
        train, val, width, classes: arguments of `bytes_needed`.
        instead: options that need less, for the sentence.

    Raises:
        ConfigError: the ranks of this machine would need more than is free.
    """
    ranks = distributed.local_world_size()
    needed, free = ranks * bytes_needed(train, val, width, classes) / 1e9, free_memory() / 1e9
    if needed > free:
        raise ConfigError(
            f"logistic regression on {train} images of {width} features and {classes} classes "
            f"takes {needed:.1f} GB of memory on this machine ({ranks} ranks), but {free:.1f} GB "
            f"are free: {instead}, or take a machine or container with more memory"
        )


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Shifts and scales every column by the mean and standard deviation of `train`.

    Returns `train` [N, C] and each of `others` [M, C] in float64; what is float64 already changes
    in place, because a copy may not fit into memory.
    """
    parts = [part.double() for part in (train, *others)]
    mean, deviation = parts[0].mean(0), parts[0].std(0, unbiased=False).clamp(min=1e-8)
    return [part.sub_(mean).div_(deviation) for part in parts]


def fit_logistic(
    features: Tensor, targets: Tensor, classes: int, *, weight_decay: float, iterations: int = 2000
) -> tuple[Tensor, Tensor]:
    """Minimises mean cross-entropy + weight_decay / 2 * |weight|^2 by L-BFGS, starting at zero.

    scikit-learn's `LogisticRegression(C=1 / (weight_decay * N))` minimises the same function.

    Args:
        features: float64 [N, C].
        targets: int64 [N].
        classes: number of classes.
        weight_decay: weight decay of the weight; the bias has none.
        iterations: largest number of iterations.

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
        history_size=_HISTORY,
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


def predict_logistic(
    train: Tensor, targets: Tensor, val: Tensor, classes: int, weight_decay: float
) -> Tensor:
    """Fits logistic regression on standardised features and returns logits float64 [M, classes].

    Args:
        train: features [N, C] to fit on; float64 changes in place.
        targets: int64 [N].
        val: features [M, C] to predict; float64 changes in place.
        classes: number of classes.
        weight_decay: see `fit_logistic`.
    """
    ours, theirs = standardise(train, val)
    weight, bias = fit_logistic(ours, targets, classes, weight_decay=weight_decay)
    return theirs @ weight.T + bias
