"""The values that are drawn: errors instead of shares, and hours that a size's seeds share."""

from __future__ import annotations

from pathlib import Path

import pytest

from seer_scale.studies.curves import Panel, panels_of
from seer_scale.studies.results import Row
from tests.studies.test_report import SIZES, rows_of
from tests.studies.test_study import points


def panel(rows: list[Row], measure: str, axis: str) -> Panel:
    (found,) = [
        each for each in panels_of(rows, samples=2) if (each.measure, each.axis) == (measure, axis)
    ]
    return found


def test_a_share_is_drawn_as_the_error_and_a_loss_as_it_is(tmp_path: Path) -> None:
    rows = rows_of(points(tmp_path, sizes=SIZES, images=[64])[1])
    (errors,) = panel(rows, "knn/top1", "parameters").series
    (losses,) = panel(rows, "loss", "parameters").series
    assert errors.y == tuple(1 - row.evaluations["knn/top1"] for row in rows)
    assert losses.y == tuple(row.loss for row in rows)
    assert errors.x == losses.x == tuple(float(row.parameters) for row in rows)


def test_seeds_of_a_size_share_their_mean_hours_and_keep_their_flops(tmp_path: Path) -> None:
    rows = rows_of(points(tmp_path, sizes=SIZES, images=[64])[1])
    (hours,) = panel(rows, "loss", "hours").series
    (flops,) = panel(rows, "loss", "flops").series
    # Seed 1 takes a hundredth more than seed 0, see `rows_of`.
    assert hours.x == pytest.approx([row.parameters * 1e-7 * 1.005 for row in rows])
    assert len(set(hours.x)) == len(SIZES)
    assert flops.x == tuple(row.flops for row in rows)
