"""The documentation as a site: it builds, fits a phone and a desk, and its search finds keys."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness.browser import chromium, needs_chromium
from harness.jobs import ROOT

pytestmark = pytest.mark.slow

# What does not fit: the page, lines of code, names in the first column, tables by their headings.
MEASURE = """
const tooWide = box => box.scrollWidth > box.clientWidth + 1;
const all = selector => [...document.querySelectorAll(".md-content " + selector)];
const drawing = box => innerWidth < 1000 && box.parentElement.hasAttribute("data-drawing");
return {
  page: tooWide(document.documentElement),
  code: all("pre > code").filter(tooWide).filter(box => !drawing(box))
    .map(box => box.innerText.slice(0, 60)),
  names: all("td:first-child > code").filter(box => box.getClientRects().length > 1)
    .map(box => box.innerText),
  tables: all(".md-typeset__scrollwrap").filter(tooWide)
    .map(box => box.querySelector("th").innerText),
};
"""
RESULTS = """
return [...document.querySelectorAll(".md-search-result__item")]
  .map(item => item.querySelector("a").getAttribute("href"));
"""
# First headings of tables that a phone shows without scrolling.
STACKED = {
    "FORMAT",
    "choice",
    "command",
    "fault",
    "feature",
    "figure",
    "floor",
    "input",
    "key",
    "preset",
    "sharding.strategy",
    "your images",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command: list[str | Path] = [
        Path(sys.executable).with_name("mkdocs"),
        "build",
        "--strict",
        "--site-dir",
        folder,
    ]
    # What `make docs` sets: the theme's authors advertise another program.
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the site is served: a search needs a server."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"""<(?:script|img|iframe)[^>]+src="?https?:|<link[^>]+href="?https?:""")
    for path in site.rglob("*.html"):
        assert not loaded.search(path.read_text()), f"{path.name} loads something from elsewhere"


@needs_chromium
@pytest.mark.parametrize("width", [390, 1440])
def test_every_page_fits_the_window(site: Path, width: int) -> None:
    pages = sorted(set(site.glob("*.html")) - {site / "404.html"})  # which needs a server
    assert len(pages) > 25
    found: list[str] = []
    with chromium(width, 900) as browser:
        for page in pages:
            browser.get(page.as_uri())
            seen = browser.execute_script(MEASURE)
            if width < 1000:  # numbers in many columns are scrolled
                seen["tables"] = [name for name in seen["tables"] if name in STACKED]
            found += [f"{page.name}: {what} {wide}" for what, wide in seen.items() if wide]
        assert browser.get_log("browser") == []
    assert found == []


@needs_chromium
@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("crop_sizes", "config.html"),
        ("data.crop_sizes", "config.html"),
        ("sinkhorn_iterations", "config.html"),
        ("OOM", "troubleshooting.html"),
        ("--deepspeed_config", "config.html"),
        ("checkpoint", "checkpoints.html"),
    ],
)
def test_a_search_finds_keys_and_the_log_comes_last(address: str, words: str, first: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    with chromium(1440, 900) as browser:
        browser.get(f"{address}/index.html?q={words}")
        found = WebDriverWait(browser, 60).until(lambda b: b.execute_script(RESULTS))
    pages = [str(place).partition(address + "/")[2].partition("?")[0] for place in found]
    assert pages[0] == first
    assert "log.html" not in pages[:-1]


def test_every_key_is_a_result_of_its_own(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    titles = {entry["location"]: entry["title"] for entry in index["docs"]}
    rows = re.findall(
        r"^\| `(\w+\.\w+)` \|", (ROOT / "docs" / "config.md").read_text(), re.MULTILINE
    )
    html = (site / "config.html").read_text()
    assert len(rows) > 80
    for key in rows:
        assert titles[f"config.html#{key}"] == key
        assert html.count(f'<tr id="{key}">') == 1


def test_drawings_keep_their_lines_and_options_their_dashes(site: Path) -> None:
    assert (site / "design.html").read_text().count("<pre data-drawing>") > 5
    assert "<pre data-drawing>" not in (site / "quick-start.html").read_text()
    assert '<span class="whole">--hostfile</span>' in (site / "clusters.html").read_text()
    sharding = (site / "sharding.html").read_text()
    assert re.search(r'<td><span class="whole">\d\.\de-\d\d</span></td>', sharding)
