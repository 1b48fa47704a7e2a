"""A real browser for tests: headless Chromium, where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium") and find_spec("selenium")),
    reason="chromium, chromium-driver or selenium is not installed",
)

# Without a screen Chromium says that it has no mouse, and charts then always show their buttons.
MOUSE = "primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"


@contextmanager
def chromium(width: int, height: int) -> Iterator[Chrome]:
    """A browser whose pages are exactly so many pixels large, and which keeps its console."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--blink-settings={MOUSE}",
    ):
        options.add_argument(argument)
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        # A window's size would count its frame.
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield browser
    finally:
        browser.quit()
