"""The page of a study shows every plot, says what was not fitted, and works in a real browser."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from harness.browser import chromium, needs_chromium
from seer_scale.studies.curves import AXES, Panel, Series, panels_of
from seer_scale.studies.fit import Fit, PowerLaw
from seer_scale.studies.report import _laws, write_report
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
    assert len(images) == len(list(page.parent.glob("*.png"))) == 2 * 4 + 3
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
        assert drawn == [True] * 11
        # Letters of 10 points at 120 dots per inch are 16.7 pixels high; 10 are legible.
        scales = browser.execute_script(
            "return [...document.images].map(i => i.getBoundingClientRect().width / i.naturalWidth)"
        )
        assert min(scales) * 10 * 120 / 72 > 9.5
        # Nothing but the tables may be wider than the window, and these scroll by themselves.
        wide = browser.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0


def test_no_law_where_points_do_not_fall_and_no_panel_of_one_value(tmp_path: Path) -> None:
    _, found = points(tmp_path, sizes=SIZES)
    rows = [row for row in rows_of(found) if row.point.images == found[0].images]
    ups = {name: number for number, name in enumerate(SIZES)}
    rising = [replace(row, loss=2.0 + ups[row.point.trunk] * 0.1) for row in rows]
    level = [replace(row, loss=2.0 + 0.1 * (ups[row.point.trunk] % 2)) for row in rows]
    for these, law in ((rows, True), (rising, False), (level, False)):
        panels = [panel for panel in panels_of(these, samples=3) if panel.measure == "loss"]
        assert [panel.axis for panel in panels] == ["parameters", "flops", "hours"]
        for series in panels[0].series:
            assert (series.fit is not None) == law
            assert series.why_not == (
                None if law else "not fitted: the points do not fall along this axis"
            )


def test_an_interval_of_no_width_is_not_written() -> None:
    """Three points are met exactly by a law of three parameters: resampling leaves it as it is."""
    law = PowerLaw(1.0, 2.0, 0.5, 10.0)
    fit = Fit(law, (law,) * 5, held_out=None)
    series = Series("swav", (1.0, 2.0, 3.0), (3.0, 2.0, 1.0), fit, None)
    (row,) = _laws([Panel("loss", "loss, last tenth", "parameters", (series,))])
    assert row[1:] == ["3", "1", "0.5", "too few"]


def test_a_law_is_written_with_its_own_band() -> None:
    """Five laws whose floors, scales and exponents lie apart; quantiles 0.05 and 0.95 of five."""
    laws = tuple(PowerLaw(1.0 + n, 100.0 + n, 0.1 * (n + 1), 10.0) for n in range(5))
    fit = Fit(PowerLaw(3.0, 102.0, 0.3, 10.0), laws, held_out=-0.125)
    series = Series("swav", (1.0, 2.0, 3.0), (3.0, 2.0, 1.0), fit, None)
    (row,) = _laws([Panel("loss", "loss, last tenth", "parameters", (series,))])
    assert row[1:] == ["3", "3 [1.2, 4.8]", "0.3 [0.12, 0.48]", "-12.5%"]
    assert "swav" in row[0]


def test_one_of_a_kind_is_said_in_the_singular(tmp_path: Path) -> None:
    study, found = points(tmp_path, sizes=SIZES[:2], seeds=[0], images=[64])
    page = write_report(study, rows_of(found), tmp_path / "report", tracking=None, missing=[])
    assert "2 sizes x 1 seed x 1 image budget x 1 objective" in page.read_text()
