"""The report of a study: one HTML page with embedded pictures, and the pictures as files."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from seer_scale.storage.atomic import replaced_file
from seer_scale.studies.curves import AXES, Panel, panels_of
from seer_scale.studies.figures import draw_efficiency, draw_panel
from seer_scale.studies.results import Row
from seer_scale.studies.study import Study

PAGE = "report.html"
TEMPLATE = "report.html.j2"  # beside this module


def write_report(
    study: Study, rows: Sequence[Row], folder: Path, *, tracking: str | None, missing: Sequence[str]
) -> Path:
    """Draws the curves and writes the page.

    Args:
        study: the study.
        rows: finished points, at least one.
        folder: folder for the page and the pictures; created if it does not exist.
        tracking: web address of the MLflow server that the page links runs to; None for no links.
        missing: names of the points that are not finished.

    Returns:
        Path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    panels = panels_of(rows)
    names = sorted({name for row in rows for name in row.evaluations})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(TEMPLATE).render(
        study=study,
        grid=_grid(study),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        missing=missing,
        figures=[
            {"caption": caption, "data": base64.b64encode(path.read_bytes()).decode()}
            for path, caption in _figures(panels, rows, folder)
        ],
        laws=list(_laws(panels)),
        columns=[
            *("run", "parameters", "FLOPs", "images", "GPU-hours", "loss", *names),
            *("images/s", "memory [GiB]", "MFU"),
        ],
        runs=[{"cells": _cells(row, names), "id": row.run_id} for row in rows],
        tracking=tracking,
    )
    page = folder / PAGE
    with replaced_file(page) as fresh:
        fresh.write_text(text)
    return page


def _grid(study: Study) -> str:
    counts = [
        (len(study.sizes), "sizes"),
        (len(study.seeds), "seeds"),
        (len(study.images), "image budgets"),
        (len(study.objectives), "objectives"),
    ]
    return " x ".join(
        f"{count} {name if count > 1 else name[:-1]}" for count, name in counts if count
    )


def _figures(
    panels: Sequence[Panel], rows: Sequence[Row], folder: Path
) -> Iterator[tuple[Path, str]]:
    """Draws every picture into `folder`; yields its path and its caption."""
    for panel in panels:
        path = folder / f"{panel.measure}_{panel.axis}.png".replace("/", "_")
        draw_panel(panel, path)
        yield path, f"{panel.measure} against {AXES[panel.axis][0]}"
    for name, title in (
        ("images_per_second", "images per second"),
        ("peak_memory_gib", "peak memory of rank 0 [GiB]"),
        ("mfu", "model FLOPs utilisation"),
    ):
        known = [row for row in rows if getattr(row, name) is not None]
        if known:
            path = folder / f"{name}.png"
            draw_efficiency(known, title, [getattr(row, name) for row in known], path)
            yield path, f"{title} against size"


def _laws(panels: Sequence[Panel]) -> Iterator[list[str]]:
    for panel in panels:
        for series in panel.series:
            name = f"{panel.title} by {AXES[panel.axis][0]}; {series.label}"
            fit, points = series.fit, str(len(series.x))
            if fit is None:
                yield [name, points, str(series.why_not), "", ""]
                continue
            limit = " (the points do not tell)" if fit.law.unbounded else ""
            yield [
                name,
                points,
                _with_band(fit.law.floor, [law.floor for law in fit.laws]),
                _with_band(fit.law.exponent, [law.exponent for law in fit.laws]) + limit,
                "too few" if fit.held_out is None else f"{fit.held_out:+.1%}",
            ]


def _with_band(value: float, drawn: Sequence[float]) -> str:
    """Writes the middle 90 % behind a value; three points, or a floor of 0, may leave no width."""
    low, high = (f"{bound:.3g}" for bound in np.quantile(drawn, [0.05, 0.95]))
    return f"{value:.3g}" if low == high else f"{value:.3g} [{low}, {high}]"


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    """The cells of a run in the table, all but the link to MLflow."""
    found = row.evaluations
    return [
        row.point.name,
        f"{row.parameters / 1e6:.2f}M",
        f"{row.flops:.3g}",
        f"{row.point.images:,}",
        f"{row.rank_hours:.3g}",
        f"{row.loss:.4f}",
        *(f"{found[name]:.4g}" if name in found else "" for name in names),
        f"{row.images_per_second:.1f}",
        f"{row.peak_memory_gib:.2f}",
        "" if row.mfu is None else f"{row.mfu:.1%}",
    ]
