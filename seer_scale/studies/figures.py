"""The pictures of a study's report, for the colour-blind and for print: colours, marks, dashes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seer_scale.studies.curves import AXES, Panel, Series
from seer_scale.studies.results import Row

# Okabe and Ito's colours.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")
_WIDTH, _HEIGHT, _DPI = 5.0, 3.8, 120


def draw_measure(panels: Sequence[Panel], path: Path) -> None:
    """All axes of one measure, two by two, with laws and their bands where there are any."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    columns = 2
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(columns * _WIDTH, lines * _HEIGHT), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, place)
        for number, series in enumerate(panel.series):
            _draw_series(axes, series, number)
        axes.set(xscale="log", xlabel=AXES[panel.axis][0], ylabel=panel.title)
        _label_sizes(axes)
        if min(min(series.y) for series in panel.series) > 0:
            axes.set_yscale("log")
            # Losses span less than a decade: a logarithm's own ticks would say 2.4 x 10^0.
            axes.yaxis.set(major_locator=MaxNLocator(6), minor_locator=NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=_DPI)


def draw_efficiency(rows: Sequence[Row], path: Path) -> None:
    """Images per second, memory and, where the peak is known, MFU against the trunk's size."""
    from matplotlib.figure import Figure

    measures: list[tuple[str, list[float | None]]] = [
        ("images per second", [row.images_per_second for row in rows]),
        ("peak memory of rank 0 [GiB]", [row.peak_memory_gib for row in rows]),
    ]
    if any(row.mfu is not None for row in rows):
        measures.append(("model FLOPs utilisation", [row.mfu for row in rows]))
    figure = Figure(figsize=(len(measures) * 4.0, _HEIGHT), layout="constrained")
    objectives = sorted({row.point.objective for row in rows})
    for place, (title, values) in enumerate(measures, start=1):
        axes = figure.add_subplot(1, len(measures), place)
        for number, objective in enumerate(objectives):
            chosen = [
                (row.parameters, value)
                for row, value in zip(rows, values, strict=True)
                if row.point.objective == objective and value is not None
            ]
            axes.plot(*zip(*chosen, strict=True), _MARKS[number], color=_COLOURS[number])
        axes.set(xscale="log", xlabel=AXES["parameters"][0], ylabel=title)
        axes.set_ylim(bottom=0)
        _label_sizes(axes)
        axes.grid(True, alpha=0.25)
    figure.savefig(path, dpi=_DPI)


def _label_sizes(axes: Any) -> None:
    """2M, 5M, 10M ... instead of powers of ten, on the logarithmic x axis."""
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
