"""The report of a study: one HTML page that needs nothing but itself, and its pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from seer_scale.studies.curves import AXES, Panel, panels_of
from seer_scale.studies.figures import draw_efficiency, draw_measure
from seer_scale.studies.results import Row
from seer_scale.studies.study import Study

PAGE = "report.html"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem;
  color: #111; background: #fff; }
h1, h2 { line-height: 1.2; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { border-bottom: 1px solid #bbb; padding: 0.25rem 0.6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
a { color: #0645ad; }
@media print { body { max-width: none; } .table { overflow: visible; } table { font-size: 8pt; } }
"""


def write_report(
    study: Study, rows: Sequence[Row], folder: Path, *, tracking: str | None, missing: Sequence[str]
) -> Path:
    """Draws the curves and writes the page.

    Args:
        study: what was asked for.
        rows: the finished points, at least one.
        folder: for the page and the pictures; made here.
        tracking: address of the MLflow server that runs are linked to, if it is one on the web.
        missing: names of points that have not finished.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    panels = panels_of(rows)
    measures = list(dict.fromkeys(panel.measure for panel in panels))
    figures = []
    for measure in measures:
        path = folder / f"{measure.replace('/', '_')}.png"
        draw_measure([panel for panel in panels if panel.measure == measure], path)
        figures.append((path, f"{measure} against parameters, FLOPs, images and GPU-hours"))
    efficiency = folder / "efficiency.png"
    draw_efficiency(rows, efficiency)
    figures.append((efficiency, "throughput, memory and utilisation against size"))
    sections = [
        f"<h1>Scaling study: {html.escape(study.name)}</h1>",
        f"<p>{len(rows)} runs of recipe <code>{html.escape(study.recipe)}</code>: "
        f"{_words(study)}. Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>",
        *([f"<p><strong>Not finished:</strong> {_list(missing)}.</p>"] if missing else []),
        *(_figure(path, caption) for path, caption in figures),
        "<h2>Laws</h2>",
        "<p>floor + scale * (x / x<sub>0</sub>)<sup>-exponent</sup>, least squares; in brackets the"
        " middle 90 % of a bootstrap over the points. Held out: how far the law of the smaller ones"
        " is off at the largest.</p>",
        _table(*_laws(panels)),
        "<h2>Runs</h2>",
        _table(*_runs(rows, tracking)),
    ]
    page = folder / PAGE
    page.write_text(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>"
        f"<title>Scaling study: {html.escape(study.name)}</title><style>{_STYLE}</style></head>"
        "<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
    return page


def _words(study: Study) -> str:
    counts = [
        (len(study.sizes), "sizes"),
        (len(study.seeds), "seeds"),
        (len(study.images), "budgets of images"),
        (len(study.objectives), "objectives"),
    ]
    return " x ".join(
        f"{count} {name if count > 1 else name[:-1]}" for count, name in counts if count
    )


def _list(names: Iterable[str]) -> str:
    return ", ".join(html.escape(name) for name in names)


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return (
        f"<figure><img alt='{text}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{text}</figcaption></figure>"
    )


def _laws(panels: Sequence[Panel]) -> tuple[list[str], list[list[str]]]:
    header = ["measure, axis", "points", "floor", "exponent", "held out"]
    lines = []
    for panel in panels:
        for series in panel.series:
            name = html.escape(f"{panel.title} by {AXES[panel.axis][0]}; {series.label}")
            if series.fit is None:
                lines.append([name, str(len(series.x)), str(series.why_not), "", ""])
                continue
            fit = series.fit
            floors = [law.floor for law in fit.laws]
            exponents = [law.exponent for law in fit.laws]
            limit = " (the points do not tell)" if fit.law.unbounded else ""
            held_out = "too few" if fit.held_out is None else f"{fit.held_out:+.1%}"
            lines.append(
                [
                    name,
                    str(len(series.x)),
                    _with_band(fit.law.floor, floors),
                    _with_band(fit.law.exponent, exponents) + limit,
                    held_out,
                ]
            )
    return header, lines


def _with_band(value: float, drawn: Sequence[float]) -> str:
    low, high = np.quantile(drawn, [0.05, 0.95])
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def _runs(rows: Sequence[Row], tracking: str | None) -> tuple[list[str], list[list[str]]]:
    names = sorted({name for row in rows for name in row.evaluations})
    header = [
        *("run", "parameters", "FLOPs", "images", "GPU-hours", "loss", *names),
        *("images/s", "memory [GiB]", "MFU", "MLflow run"),
    ]
    lines = []
    for row in rows:
        link = row.run_id[:8] if row.run_id else "not sent"
        if row.run_id and tracking:
            link = f"<a href='{html.escape(tracking)}/#/runs/{row.run_id}'>{link}</a>"
        lines.append(
            [
                html.escape(row.point.name),
                f"{row.parameters / 1e6:.2f}M",
                f"{row.flops:.3g}",
                f"{row.point.images:,}",
                f"{row.rank_hours:.3g}",
                f"{row.loss:.4f}",
                *(
                    f"{row.evaluations[name]:.4g}" if name in row.evaluations else ""
                    for name in names
                ),
                f"{row.images_per_second:.1f}",
                f"{row.peak_memory_gib:.2f}",
                "" if row.mfu is None else f"{row.mfu:.1%}",
                link,
            ]
        )
    return header, lines


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where the window is narrow; cells are HTML already."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<div class='table'><table><tr>{head}</tr>{body}</table></div>"
