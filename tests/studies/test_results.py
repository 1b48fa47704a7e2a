"""The numbers of a finished point, read off files that a test wrote, against sums by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seer_scale.studies.results import Row, row_of
from tests.studies.test_study import points


def finished(folder: Path, peak_flops: float | None = 1e12) -> Row:
    """A point of 64 images whose run wrote 20 steps and two evaluations among them."""
    study, found = points(folder, evaluate={"data": "images", "tasks": {"knn": {}}})
    point = next(point for point in found if point.images == 64)
    point.folder.mkdir(parents=True)
    lines = []
    for step in range(1, 21):
        speed = 100.0 if step == 1 else 1000.0 + step
        line = {"loss": 10.0 - step / 4, "step_time": 9.0, "images_per_second": speed}
        lines.append({"step": step, **line, "peak_memory_gib": 3.0 if step == 7 else 2.0})
        if step in (10, 20):
            lines.append({"step": step, "eval/knn_top1": 0.5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (point.folder / "metrics.jsonl").write_text(text)
    report = folder / "out" / "evaluations" / point.name / "knn.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"metrics": {"top1": 0.25, "top5": 0.75}}))
    return row_of(
        study,
        folder / "out",
        point,
        parameters=1000,
        flops_per_image=5e8,
        peak_flops=peak_flops,
    )


def test_every_number_is_that_of_the_whole_run_and_of_all_ranks(tmp_path: Path) -> None:
    row = finished(tmp_path)
    assert row.parameters == 1000
    assert row.flops == 64 * 5e8
    assert row.loss == pytest.approx((5.25 + 5.0) / 2)  # of steps 19 and 20
    assert row.rank_hours == pytest.approx(2 * 20 * 9 / 3600)  # two ranks
    assert row.images_per_second == 1010.5  # the first step, which is slow, hardly counts
    assert row.peak_memory_gib == 3.0
    assert row.mfu == pytest.approx(5e8 * 1010.5 / 2e12)
    assert row.evaluations == {"knn/top1": 0.25, "knn/top5": 0.75}


def test_without_a_peak_there_is_no_utilisation(tmp_path: Path) -> None:
    assert finished(tmp_path, peak_flops=None).mfu is None
