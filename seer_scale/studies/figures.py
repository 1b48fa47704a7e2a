"""The pictures of a report; curves differ in colour, mark and dash for colour-blind readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seer_scale.studies.curves import AXES, Panel, Series
from seer_scale.studies.results import Row

# Colours of Okabe and Ito (2008), which colour-blind people can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")
_WIDTH, _HEIGHT, _DPI = 5.0, 3.8, 120


def draw_panel(panel: Panel, path: Path) -> None:
    """Draws one measure against one axis, with fitted laws and their bands, as a PNG file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    for number, series in enumerate(panel.series):
        _draw_series(axes, series, number)
    axes.set(xscale="log", xlabel=AXES[panel.axis][0], ylabel=panel.title)
    _label_sizes(axes)
    if min(min(series.y) for series in panel.series) > 0:
        axes.set_yscale("log")
        # Losses span less than a decade: the default logarithmic ticks would read 2.4 x 10^0.
        axes.yaxis.set(major_locator=MaxNLocator(6), minor_locator=NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=_DPI)


def draw_efficiency(rows: Sequence[Row], title: str, values: Sequence[float], path: Path) -> None:
    """Draws a value of each run against the trunk's size, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    for number, objective in enumerate(sorted({row.point.objective for row in rows})):
        chosen = [
            (row.parameters, value)
            for row, value in zip(rows, values, strict=True)
            if row.point.objective == objective
        ]
        axes.plot(*zip(*chosen, strict=True), _MARKS[number], color=_COLOURS[number])
    axes.set(xscale="log", xlabel=AXES["parameters"][0], ylabel=title)
    axes.set_ylim(bottom=0)
    _label_sizes(axes)
    axes.grid(True, alpha=0.25)
    figure.savefig(path, dpi=_DPI)


def _label_sizes(axes: Any) -> None:
    """Labels a logarithmic x axis with 2M, 5M, 10M instead of powers of ten."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_series(axes: Any, series: Series, number: int) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    axes.plot(
        series.x,
        series.y,
        _MARKS[number % len(_MARKS)],
        color=colour,
        markerfacecolor="none",
        label=series.label,
    )
    if series.fit is None:
        return
    grid = np.geomspace(min(series.x), max(series.x), 60)
    low, high = series.fit.band(grid)
    axes.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(grid, series.fit.law(grid), _DASHES[number % len(_DASHES)], color=colour)
