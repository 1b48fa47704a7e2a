"""The curves of a study: what is drawn against what, and the law through each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from seer_scale.studies.fit import Fit, fit_power_law, too_few
from seer_scale.studies.results import Row

AXES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "parameters": ("parameters of the trunk", lambda row: float(row.parameters)),
    "flops": ("FLOPs of the training", lambda row: row.flops),
    "images": ("images seen in training", lambda row: float(row.point.images)),
    "hours": ("GPU-hours", lambda row: row.rank_hours),
}
"""What a law is sought in: a title, and the number of a row."""

SHARES = ("top1", "mAP", "map", "ap")
"""Metrics that are shares of what would be perfect: drawn as the share that is missing."""


@dataclass(frozen=True)
class Series:
    """Points that are one curve.

    Attributes:
        label: what sets them apart from the others of the panel.
        x, y: of each point.
        fit: the law through them, or None.
        why_not: the reason where there is none.
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
        measure: name of what is drawn, such as `loss` or `knn/top1`.
        title: of the y axis.
        axis: key of `AXES`.
        series: the curves.
    """

    measure: str
    title: str
    axis: str
    series: tuple[Series, ...]


def panels_of(rows: Sequence[Row], *, samples: int = 200) -> list[Panel]:
    """Loss and evaluations against every axis; an evaluation as the share that is missing.

    Along parameters and hours a curve is one budget and one objective; along images one trunk and
    one objective; along FLOPs one objective.
    """
    return [
        Panel(measure, title, axis, tuple(_series(rows, axis, value, samples)))
        for measure, title, value in _measures(rows)
        for axis in AXES
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
        # Seeds take about the same time, not the same: they are one size all the same.
        if axis == "hours":
            x = _by_trunk(members, x)
        reason = too_few(x)
        fit = None if reason else fit_power_law(x, y, samples=samples)
        yield Series(", ".join(key), x, y, fit, reason)


def _by_trunk(rows: Sequence[Row], x: Sequence[float]) -> tuple[float, ...]:
    """The mean of every trunk's points in place of each."""
    sums: dict[str, list[float]] = {}
    for row, value in zip(rows, x, strict=True):
        sums.setdefault(row.point.trunk, []).append(value)
    return tuple(sum(sums[row.point.trunk]) / len(sums[row.point.trunk]) for row in rows)
