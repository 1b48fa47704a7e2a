"""Saturating power laws through the points of a study, with how sure one can be of them.

`y = floor + scale * x ** -exponent` (Kaplan et al., arXiv 2001.08361, with the irreducible term of
Henighan et al., arXiv 2010.14701), for a loss or an error that falls with x. Fitted by SciPy from
several starts; the band comes from a bootstrap over the points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

PARAMETERS = 3  # floor, scale, exponent
_LARGEST_EXPONENT = 4.0
_STARTS = (0.1, 0.3, 0.6, 1.0, 2.0)  # exponents; the problem has local minima
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """A law through points, `floor + scale * (x / x_0) ** -exponent`.

    Attributes:
        floor: what y does not fall below, however large x is.
        scale: how far y lies above it at `x_0`.
        exponent: of the fall.
        x_0: geometric mean of the fitted x; only keeps the numbers of `scale` handy.
    """

    floor: float
    scale: float
    exponent: float
    x_0: float

    def __call__(self, x: Floats | float) -> Floats:
        """The law's y at x."""
        ratio = np.asarray(x, dtype=np.float64) / self.x_0
        return np.asarray(self.floor + self.scale * ratio**-self.exponent)


@dataclass(frozen=True)
class Fit:
    """A law, its band and its errors.

    Attributes:
        law: through all points.
        laws: through bootstrap samples of them.
        held_out: relative error of predicting the points of the largest x from the others:
            (predicted - mean measured) / mean measured; None where too few are left for a fit.
    """

    law: PowerLaw
    laws: tuple[PowerLaw, ...]
    held_out: float | None

    def band(self, x: Floats, level: float = 0.9) -> tuple[Floats, Floats]:
        """Lower and upper end, at every x, of the middle `level` of the bootstrap's laws."""
        values = np.stack([law(x) for law in self.laws])
        tail = (1 - level) / 2
        return np.quantile(values, tail, axis=0), np.quantile(values, 1 - tail, axis=0)


def too_few(x: Sequence[float]) -> str | None:
    """Why no law can be fitted through points at `x`, or None."""
    different = len(set(x))
    if different <= PARAMETERS - 1:
        return (
            f"not fitted: a law of {PARAMETERS} parameters needs at least {PARAMETERS} different "
            f"values, there are {different}"
        )
    return None


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
        x: sizes, FLOPs, images or hours; several points may share one (seeds).
        y: losses or errors.
        samples: of the bootstrap. Points are drawn within each x, so that every sample has all
            sizes; where an x has one point only, its residual is drawn from those of all.
        seed: of the draws.
        least: what the floor cannot be below.

    Raises:
        ValueError: if the points are too few (`too_few` says so beforehand) or not finite.
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
        _solve(points_x, _drawn(rng, points_x, points_y, law, residuals), least, near=law)
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


def _solve(x: Floats, y: Floats, least: float, near: PowerLaw | None = None) -> PowerLaw:
    """Least squares in y; from several exponents, or from near a law that is about right."""
    x_0 = math.exp(float(np.log(x).mean()))
    ratio = x / x_0
    spread = max(float(np.ptp(y)), 1e-12)
    highest = float(y.max()) + spread
    starts = [near.exponent] if near else _STARTS

    def residuals(parameters: Floats) -> Floats:
        floor, scale, exponent = parameters
        return np.asarray((floor + scale * ratio**-exponent - y) / spread)

    best: tuple[float, Floats] | None = None
    for exponent in starts:
        # At a given exponent the rest is linear.
        design = np.stack([np.ones_like(ratio), ratio**-exponent], axis=1)
        floor, scale = np.linalg.lstsq(design, y, rcond=None)[0]
        start = [
            min(max(floor, least), highest),
            max(float(scale), 1e-9 * spread),
            min(max(exponent, 1e-3), _LARGEST_EXPONENT),
        ]
        bounds = ([least - 1e-12, 0.0, 0.0], [highest + 1e-12, np.inf, _LARGEST_EXPONENT + 1e-9])
        found = least_squares(residuals, start, bounds=bounds, x_scale=[spread, spread, 1.0])
        if best is None or found.cost < best[0]:
            best = (float(found.cost), found.x)
    assert best is not None
    floor, scale, exponent = (float(value) for value in best[1])
    return PowerLaw(floor, scale, exponent, x_0)
