"""The curves of a study: every measure against every axis, with a fitted law through each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from seer_scale.studies.fit import Fit, fit_power_law, not_falling, too_few
from seer_scale.studies.results import Row

AXES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "parameters": ("parameters of the trunk", lambda row: float(row.parameters)),
    "flops": ("FLOPs of the training", lambda row: row.flops),
    "images": ("images seen in training", lambda row: float(row.point.images)),
    "hours": ("GPU-hours", lambda row: row.rank_hours),
}
"""Name of an axis -> its title, and the function that reads its value off a row."""

SHARES = ("top1", "mAP", "map", "ap")
"""Metrics that are at most 1: drawn as the error, 1 - metric."""


@dataclass(frozen=True)
class Series:
    """The points of one curve.

    Attributes:
        label: objective, and budget or trunk, of the curve.
        x: value on the axis of each point.
        y: measure of each point.
        fit: the law through the points; None if they are too few or do not fall.
        why_not: the reason why there is no law; None if there is one.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    fit: Fit | None
    why_not: str | None


@dataclass(frozen=True)
class Panel:
    """One plot: a measure against an axis.

    Attributes:
        measure: name of the measure, such as `loss` or `knn/top1`.
        title: title of the y axis.
        axis: key of `AXES`.
        series: the curves.
    """

    measure: str
    title: str
    axis: str
    series: tuple[Series, ...]


def panels_of(rows: Sequence[Row], *, samples: int = 200) -> list[Panel]:
    """Draws loss and evaluation errors (1 - metric) against every axis.

    Against parameters and hours, a curve has one budget and one objective. Against images, a curve
    has one trunk and one objective. Against FLOPs, a curve has one objective. An axis on which all
    points have the same value has no panels.

    Args:
        rows: results of the finished points.
        samples: bootstrap samples of a fit.
    """
    return [
        Panel(measure, title, axis, tuple(_series(rows, axis, value, samples)))
        for measure, title, value in _measures(rows)
        for axis, (_, of) in AXES.items()
        if len({of(row) for row in rows}) > 1
    ]


def _measures(rows: Sequence[Row]) -> Iterator[tuple[str, str, Callable[[Row], float]]]:
    yield "loss", "loss, last tenth", lambda row: row.loss
    for name in sorted({name for row in rows for name in row.evaluations}):
        if name.rpartition("/")[2] in SHARES:
            yield name, f"1 - {name}", lambda row, name=name: 1 - row.evaluations[name]  # type: ignore[misc]


def _series(
    rows: Sequence[Row], axis: str, value: Callable[[Row], float], samples: int
) -> Iterator[Series]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        point = row.point
        key = {
            "images": (point.objective, point.trunk),
            "flops": (point.objective,),
        }.get(axis, (point.objective, f"{point.images:,} images"))
        groups.setdefault(key, []).append(row)
    for key, members in groups.items():
        x = tuple(AXES[axis][1](row) for row in members)
        y = tuple(value(row) for row in members)
        # Runs that differ in the seed only take slightly different times: use their mean.
        if axis == "hours":
            x = _by_trunk(members, x)
        reason = too_few(x)
        fit = None if reason else fit_power_law(x, y, samples=samples)
        if fit and (reason := not_falling(x, y, fit.law)):
            fit = None
        yield Series(", ".join(key), x, y, fit, reason)


def _by_trunk(rows: Sequence[Row], x: Sequence[float]) -> tuple[float, ...]:
    """Replaces every value by the mean over the points of the same trunk."""
    sums: dict[str, list[float]] = {}
    for row, value in zip(rows, x, strict=True):
        sums.setdefault(row.point.trunk, []).append(value)
    return tuple(sum(sums[row.point.trunk]) / len(sums[row.point.trunk]) for row in rows)
