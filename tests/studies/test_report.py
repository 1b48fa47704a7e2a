"""The page of a study holds every plot, says what was not fitted, and works in a real browser."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from PIL import Image

from harness.browser import chromium, needs_chromium
from seer_scale.studies.curves import AXES, panels_of
from seer_scale.studies.report import write_report
from seer_scale.studies.results import Row
from seer_scale.studies.study import Point, Study
from tests.studies.test_study import points

SIZES = ["regnety_200mf", "regnety_400mf", "regnety_800mf", "regnety_1_6gf"]


def rows_of(found: list[Point], mfu: float | None = 0.3) -> list[Row]:
    """Rows of a world in which loss and error fall with size, a little differently by seed."""
    rows = []
    for point in found:
        parameters = 2_000_000 * 2 ** SIZES.index(point.trunk)
        error = 0.1 + 200 * parameters**-0.4 * (1 + 0.02 * point.seed) * (64 / point.images) ** 0.1
        rows.append(
            Row(
                point=point,
                parameters=parameters,
                flops=6.0 * parameters * point.images,
                loss=2 + error,
                rank_hours=parameters * 1e-7 * (1 + 0.01 * point.seed),
                images_per_second=1e9 / parameters,
                peak_memory_gib=parameters * 1e-6,
                mfu=mfu,
                evaluations={"knn/top1": 1 - error, "knn/images": 10.0},
                run_id=f"{abs(hash(point.name)):032x}",
            )
        )
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[Row], Path]:
    tmp_path = tmp_path_factory.mktemp("study")
    study, found = points(tmp_path, sizes=SIZES)
    rows = rows_of(found)
    page = write_report(
        study, rows, tmp_path / "report", tracking="http://127.0.0.1:5000", missing=["a<b"]
    )
    return study, rows, page


def test_every_measure_is_a_panel_on_every_axis(made: tuple[Study, list[Row], Path]) -> None:
    _, rows, _ = made
    panels = panels_of(rows, samples=5)
    assert {(panel.measure, panel.axis) for panel in panels} == {
        (measure, axis) for measure in ("loss", "knn/top1") for axis in AXES
    }
    for panel in panels:
        assert sum(len(series.x) for series in panel.series) == len(rows)
        for series in panel.series:
            # Two budgets are too few for a law along images, four sizes enough for one along them.
            assert (series.fit is None) == (panel.axis == "images"), panel
            assert (series.why_not or "").startswith("not fitted") == (series.fit is None)


def test_the_page_stands_alone(made: tuple[Study, list[Row], Path]) -> None:
    _, rows, page = made
    text = page.read_text()
    images = re.findall(r"src='data:image/png;base64,([^']+)'", text)
    assert len(images) == len(list(page.parent.glob("*.png"))) == 3
    for image in images:
        assert base64.b64decode(image).startswith(b"\x89PNG")
    assert not re.search(r"(src|href)='(?!data:|http://127\.0\.0\.1:5000/#/runs/)", text)
    for row in rows:
        assert row.point.name in text
        assert f"http://127.0.0.1:5000/#/runs/{row.run_id}" in text
    assert "a&lt;b" in text
    assert "not fitted: a law of 3 parameters needs at least 3 different values" in text


def test_pictures_are_drawn(made: tuple[Study, list[Row], Path]) -> None:
    for path in made[2].parent.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors() or range(300)) > 16, path


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_real_browser(made: tuple[Study, list[Row], Path], width: int) -> None:
    with chromium(width, 900) as browser:
        browser.get(made[2].as_uri())
        assert browser.get_log("browser") == []
        drawn = browser.execute_script(
            "return [...document.images].map(i => i.complete && i.naturalWidth > 0 &&"
            " i.getBoundingClientRect().width <= document.documentElement.clientWidth)"
        )
        assert drawn == [True] * 3
        # Nothing but the tables may be wider than the window, and these scroll by themselves.
        wide = browser.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0
