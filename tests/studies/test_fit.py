"""Power laws are found again, bands hold what they promise, and too few points are refused."""

from __future__ import annotations

import numpy as np
import pytest

from seer_scale.studies.fit import fit_power_law, too_few


def law(x: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
    return floor + scale * x**-exponent


@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("floor", [0.0, 1.5])
def test_an_exact_law_is_found_again(floor: float, exponent: float) -> None:
    x = np.geomspace(1e6, 1e10, 8)
    y = law(x, floor, 300.0 ** (2 * exponent), exponent)
    fit = fit_power_law(list(x), list(y), samples=5)
    assert fit.law.exponent == pytest.approx(exponent, rel=1e-3)
    assert fit.law.floor == pytest.approx(floor, abs=1e-3 * float(y.max()))
    np.testing.assert_allclose(fit.law(x), y, rtol=1e-4)
    assert fit.held_out == pytest.approx(0, abs=1e-3)


def test_the_band_holds_the_true_law_about_as_often_as_it_says() -> None:
    x = np.repeat(np.geomspace(1, 1000, 6), 4)
    grid = np.geomspace(1, 1000, 9)
    inside = []
    for seed in range(25):
        noise = np.random.default_rng(seed).normal(0, 0.02, len(x))
        fit = fit_power_law(list(x), list(law(x, 1.0, 2.0, 0.5) + noise), samples=60, seed=seed)
        low, high = fit.band(grid, level=0.9)
        true = law(grid, 1.0, 2.0, 0.5)
        inside.append(((low <= true) & (true <= high)).mean())
        assert (low <= fit.law(grid) + 0.02).all()
        assert (high > low).all()
    # A bootstrap within four points is known to be too narrow; far off it must not be.
    assert 0.6 < np.mean(inside) <= 1.0


def test_the_held_out_error_is_that_of_a_fit_without_the_largest() -> None:
    x = [1.0, 2.0, 4.0, 8.0, 16.0, 16.0]
    y = [*law(np.array(x[:4]), 0.5, 1.0, 1.0), 1.0, 1.2]
    fit = fit_power_law(x, y, samples=3)
    predicted = law(np.array(16.0), 0.5, 1.0, 1.0)
    assert fit.held_out == pytest.approx((predicted - 1.1) / 1.1, rel=1e-3)


def test_too_few_points_are_not_fitted() -> None:
    assert "not fitted" in (too_few([1.0, 2.0, 2.0, 2.0]) or "")
    with pytest.raises(ValueError, match="at least 3 different values, there are 2"):
        fit_power_law([1.0, 2.0, 2.0], [3.0, 2.0, 2.1])
    assert fit_power_law([1.0, 2.0, 4.0], [3.0, 2.0, 1.5], samples=2).held_out is None


@pytest.mark.parametrize("bad", [([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]), ([1, 2, 3], [1, np.nan, 1])])
def test_what_is_no_number_is_refused(bad: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="positive"):
        fit_power_law(*bad)


def test_points_that_do_not_tell_the_exponent_are_known() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    assert not fit_power_law(x, [1 + value**-0.5 for value in x], samples=2).law.unbounded
    assert fit_power_law(x, [2.0, 1.0, 1.0, 1.0], samples=2).law.unbounded  # all of it at once


def test_the_floor_is_never_below_the_least() -> None:
    """Of a law whose floor is -0.5; a loss or an error cannot fall below 0."""
    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    y = [-0.5 + 2 * value**-0.4 for value in x]
    assert fit_power_law(x, y, samples=1, least=-1.0).law.floor == pytest.approx(-0.5, abs=1e-3)
    bounded = fit_power_law(x, y, samples=1)
    assert bounded.law.floor == 0
    assert min(law.floor for law in bounded.laws) >= 0
