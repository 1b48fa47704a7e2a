"""Fits saturating power laws to the points of a study, with bootstrap bands.

A law is `y = floor + scale * x ** -exponent`, for a loss or an error that falls with x (Kaplan et
al., arXiv 2001.08361, section 1.2, with the irreducible term of Henighan et al., arXiv 2010.14701,
equation 1.1). SciPy finds the least squares; the band comes from a bootstrap over the points (Efron
and Tibshirani 1993, chapter 9).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

PARAMETERS = 3  # floor, scale, exponent
Floats = NDArray[np.float64]
_EXPONENTS: list[float] = np.geomspace(
    0.01, 4.0, 40
).tolist()  # tried first: the cost has local minima


@dataclass(frozen=True)
class PowerLaw:
    """A law through points, `floor + scale * (x / x_0) ** -exponent`.

    Attributes:
        floor: limit of y for large x.
        scale: y minus `floor` at `x_0`.
        exponent: how fast y falls with x.
        x_0: geometric mean of the fitted x; keeps `scale` in the range of y.
    """

    floor: float
    scale: float
    exponent: float
    x_0: float

    @property
    def unbounded(self) -> bool:
        """Whether the exponent is at a limit of the search: the points do not determine it."""
        return not 1.001 * _EXPONENTS[0] < self.exponent < 0.999 * _EXPONENTS[-1]

    def __call__(self, x: Floats | float) -> Floats:
        """Computes y at x."""
        ratio = np.asarray(x, dtype=np.float64) / self.x_0
        return np.asarray(self.floor + self.scale * ratio**-self.exponent)


@dataclass(frozen=True)
class Fit:
    """A fitted law with its uncertainty.

    Attributes:
        law: the law through all points.
        laws: the laws through bootstrap samples of the points.
        held_out: relative error at the largest x of a law fitted to all other points:
            (predicted - mean measured) / mean measured; None if too few points are left.
    """

    law: PowerLaw
    laws: tuple[PowerLaw, ...]
    held_out: float | None

    def band(self, x: Floats, level: float = 0.9) -> tuple[Floats, Floats]:
        """Computes the lower and upper limits, at every x, of the middle `level` of the laws."""
        values = np.stack([law(x) for law in self.laws])
        tail = (1 - level) / 2
        return np.quantile(values, tail, axis=0), np.quantile(values, 1 - tail, axis=0)


def too_few(x: Sequence[float]) -> str | None:
    """Says why points at `x` are too few for a law; None if they are enough."""
    different = len(set(x))
    if different <= PARAMETERS - 1:
        return (
            f"not fitted: a law of {PARAMETERS} parameters needs at least {PARAMETERS} different "
            f"values, there are {different}"
        )
    return None


def not_falling(x: Sequence[float], y: Sequence[float], law: PowerLaw) -> str | None:
    """Says that a law means nothing because its points do not fall along x; None if they do.

    They do if the law leaves less than half of the variance that a constant leaves.
    """
    points = np.asarray(y, dtype=np.float64)
    rest = points - law(np.asarray(x, dtype=np.float64))
    if float(rest @ rest) < 0.5 * float(((points - points.mean()) ** 2).sum()):
        return None
    return "not fitted: the points do not fall along this axis"


def fit_power_law(
    x: Sequence[float],
    y: Sequence[float],
    *,
    samples: int = 200,
    seed: int = 0,
    least: float = 0.0,
) -> Fit:
    """Fits a saturating power law to points of positive x.

    Args:
        x: sizes, FLOPs, images or hours; points that differ in the seed share an x.
        y: losses or errors.
        samples: number of bootstrap samples. Points are drawn within each x, so that every sample
            has all sizes; for an x with one point, a residual of any point is drawn.
        seed: seed of the draws.
        least: smallest floor that is allowed.

    Raises:
        ValueError: if the points are too few (see `too_few`), not finite or not positive in x.
    """
    points_x, points_y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if reason := too_few(x):
        raise ValueError(reason)
    if not (np.isfinite(points_x).all() and np.isfinite(points_y).all() and points_x.min() > 0):
        raise ValueError("x must be positive, x and y finite")
    law = _solve(points_x, points_y, least)
    residuals = points_y - law(points_x)
    rng = np.random.default_rng(seed)
    laws = [
        _solve(points_x, _drawn(rng, points_x, points_y, law, residuals), least)
        for _ in range(samples)
    ]
    return Fit(law, tuple(laws), _held_out(points_x, points_y, least))


def _drawn(
    rng: np.random.Generator, x: Floats, y: Floats, law: PowerLaw, residuals: Floats
) -> Floats:
    drawn = np.empty_like(y)
    for value in np.unique(x):
        here = np.flatnonzero(x == value)
        if len(here) > 1:
            drawn[here] = y[rng.choice(here, len(here))]
        else:
            drawn[here] = law(x[here]) + rng.choice(residuals, 1)
    return drawn


def _held_out(x: Floats, y: Floats, least: float) -> float | None:
    largest = x == x.max()
    if too_few(list(x[~largest])):
        return None
    predicted = float(_solve(x[~largest], y[~largest], least)(x.max()))
    measured = float(y[largest].mean())
    return (predicted - measured) / measured if measured else None


def _solve(x: Floats, y: Floats, least: float) -> PowerLaw:
    """Least squares in y: searches the exponent; floor and scale then solve a linear problem."""
    x_0 = math.exp(float(np.log(x).mean()))
    ratio = x / x_0

    def cost(exponent: float) -> float:
        return _linear(ratio, y, exponent, least)[2]

    best = int(np.argmin([cost(exponent) for exponent in _EXPONENTS]))
    around = (_EXPONENTS[max(best - 1, 0)], _EXPONENTS[min(best + 1, len(_EXPONENTS) - 1)])
    found = minimize_scalar(cost, bounds=around, method="bounded", options={"xatol": 1e-6})
    exponent = float(found.x)
    floor, scale, _ = _linear(ratio, y, exponent, least)
    return PowerLaw(floor, scale, exponent, x_0)


def _linear(ratio: Floats, y: Floats, exponent: float, least: float) -> tuple[float, float, float]:
    """The best floor >= `least`, the best scale >= 0, and the sum of squared residuals."""
    z = ratio**-exponent
    centred = z - z.mean()
    scale = float(centred @ y) / float(centred @ centred)
    floor = float(y.mean()) - scale * float(z.mean())
    if floor < least:
        floor, scale = least, float(z @ (y - least)) / float(z @ z)
    if scale < 0:
        floor, scale = max(float(y.mean()), least), 0.0
    rest = floor + scale * z - y
    return floor, scale, float(rest @ rest)
