"""MLflow's own interface, in a real browser, shows two runs, their curves, pictures and models."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from harness.browser import chromium, needs_chromium
from harness.jobs import ROOT, arguments, write_images
from tests.tracking.test_delivery import Server, until

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.slow, pytest.mark.launch, pytest.mark.timeout(900), needs_chromium]

# The script that takes the documentation's pictures.
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "screenshot_mlflow.py"))
EXPERIMENT, MODEL, RUNS = "pages", "seer-pages", ["first", "second"]
# What MLflow 3.17's pages complain of without any run: a server without logins has no users, and
# charts that are still being laid out.
NOT_OURS = ("mlflow/users/current", "ResizeObserver loop")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that two trainings have reported to."""
    folder = tmp_path_factory.mktemp("pages")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        running = Server(folder)
    try:
        images = write_images(folder / "images")
        until(running.healthy)
        for seed, name in enumerate(RUNS):
            options = [
                f"run.seed={seed}",
                f"tracking.uri={running.uri()}",
                f"tracking.experiment={EXPERIMENT}",
                f"tracking.registered_name={MODEL}",
            ]
            command = [sys.executable, "-m", "seer_scale"]
            for words in (
                ["pretrain", *arguments(images, folder / name, *options)],
                ["sync", str(folder / name)],
            ):
                subprocess.run([*command, *words], cwd=folder, env=environment, check=True)
        yield running.uri()
    finally:
        running.kill()


def seen(browser: Chrome) -> str:
    """The page's text."""
    return str(browser.execute_script("return document.body.innerText"))


def severe(browser: Chrome) -> list[str]:
    """Errors of the console, failed requests included, that MLflow has not without us."""
    return [
        line["message"]
        for line in browser.get_log("browser")
        if line["level"] == "SEVERE" and not any(known in line["message"] for known in NOT_OURS)
    ]


def click(browser: Chrome, xpath: str) -> None:
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import element_to_be_clickable
    from selenium.webdriver.support.wait import WebDriverWait

    def clicked(browser: Chrome) -> bool:
        found = element_to_be_clickable((By.XPATH, xpath))(browser)
        if found:
            found.click()
        return bool(found)

    # A page that is being drawn replaces what was just found.
    anew = (NoSuchElementException, StaleElementReferenceException)
    wait = WebDriverWait(browser, SCRIPT["SECONDS"], ignored_exceptions=anew)
    wait.until(clicked, f"{xpath} is not to be clicked")


def test_runs_curves_pictures_and_models_are_seen(server: str, tmp_path: Path) -> None:
    with chromium(SCRIPT["WIDTH"], SCRIPT["HEIGHT"]) as browser:
        SCRIPT["prepare"](browser)
        pages = SCRIPT["pages"](server, EXPERIMENT, RUNS, MODEL)
        assert set(SCRIPT["KEPT"]) < pages.keys()
        for name, page in pages.items():
            SCRIPT["open_page"](browser, page)  # waits for names, lines, picture
            assert all(wanted in seen(browser) for wanted in page.texts), name
            path: Path = tmp_path / f"{name}.png"
            SCRIPT["keep"](browser, path)
            with Image.open(path) as image:
                assert image.size == (SCRIPT["WIDTH"], SCRIPT["HEIGHT"])
        assert severe(browser) == []


def test_the_way_that_the_readme_describes(server: str) -> None:
    """Four clicks from MLflow's first page to the comparison, and one to the models."""
    said = (ROOT / "README.md").read_text()
    for label in ("Model training", "Compare", "Model registry"):
        assert label in said
    with chromium(SCRIPT["WIDTH"], SCRIPT["HEIGHT"]) as browser:
        browser.get(f"{server}/")
        click(browser, "//*[normalize-space()='Model training']")
        click(browser, f"//a[normalize-space()='{EXPERIMENT}']")
        # The box itself is transparent; what is seen and clicked lies around it.
        click(browser, "//input[@aria-label='Select all runs']/..")
        click(browser, "//button[normalize-space()='Compare']")
        until(lambda: all(name in seen(browser) for name in ("Comparing 2 Runs", *RUNS)))
        click(browser, "//a[normalize-space()='Model registry']")
        until(lambda: MODEL in seen(browser))
        assert severe(browser) == []


def test_a_page_that_shows_nothing_is_told(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from selenium.common.exceptions import TimeoutException

    with chromium(SCRIPT["WIDTH"], SCRIPT["HEIGHT"]) as browser:
        page = SCRIPT["Page"](f"{server}/#/models/{MODEL}", ["no such version"])
        monkeypatch.setitem(SCRIPT["open_page"].__globals__, "SECONDS", 5.0)
        with pytest.raises(TimeoutException, match="does not show"):
            SCRIPT["open_page"](browser, page)
        browser.get(f"{server}/#/experiments/999/runs")
        until(lambda: severe(browser))
