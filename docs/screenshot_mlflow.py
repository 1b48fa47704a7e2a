"""Opens the pages of runs in MLflow's own interface, and keeps pictures of them for docs/mlflow.md.

    mlflow server --host 127.0.0.1 --backend-store-uri sqlite:///mlflow.db
    python docs/screenshot_mlflow.py --model seer-demo first second

Needs chromium and chromium-driver. A page that does not show what it is for ends the command, so
that no picture of an empty one is kept; tests/tracking/test_pages.py opens the same pages.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.browser import chromium  # noqa: E402

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

IMAGES = ROOT / "docs" / "images"
KEPT = ("curves", "artifacts", "model")  # of `pages`; what the documentation shows
CURVES = ("embedding_std", "images_per_second", "loss", "loss_over_ln_k", "lr", "grad_norm")
SECONDS = 60.0  # until a page shows what it is for; a cold server on a busy machine takes ten
WIDTH, HEIGHT = 1400, 900
# The half of MLflow's interface that is not about language models; it opens with the other one.
TRAINING = "workflowType=machine_learning"
# Its assistant would cover the right third of every page.
SETTINGS = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.panelOpen_v1": "false",
}
LOADED = """
return [...document.images].some(image => image.complete && image.naturalWidth > 300
  && image.getBoundingClientRect().width > 300)
"""
DRAWN = """
return [...document.querySelectorAll('.js-plotly-plot')].filter(plot =>
  plot.querySelectorAll('.scatterlayer .trace path.js-line').length >= arguments[0]).length
"""


class Page(NamedTuple):
    """An address, and what has to be seen there."""

    address: str
    texts: Sequence[str]
    charts: str = ""  # typed into the search for charts: a regular expression
    shows: Callable[[Chrome], bool] = lambda _: True


def ask(uri: str, call: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An answer of MLflow's REST interface; with `fields` something is posted."""
    body = None if fields is None else json.dumps(fields).encode()
    request = Request(f"{uri}/api/2.0/mlflow/{call}", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=SECONDS) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def pages(uri: str, experiment: str, names: Sequence[str], model: str) -> dict[str, Page]:
    """The pages of an experiment with at least these runs, and of one registered model.

    Args:
        uri: of a running server.
        experiment: its name.
        names: of runs; the last one's picture is shown.
        model: a registered model's name.
    """
    found = ask(uri, f"experiments/get-by-name?experiment_name={experiment}")
    number = found["experiment"]["experiment_id"]
    search = {"experiment_ids": [number], "order_by": ["attributes.start_time DESC"]}
    runs = {
        run["info"]["run_name"]: run["info"]["run_id"]
        for run in reversed(ask(uri, "runs/search", search)["runs"])  # the newest of a name
    }
    if missing := [name for name in names if name not in runs]:
        sys.exit(f"{experiment} at {uri} has no run {', '.join(missing)}: it has {', '.join(runs)}")
    place = f"{uri}/#/experiments/{number}/runs"
    ids = json.dumps([runs[name] for name in names]).replace(" ", "")
    return {
        "runs": Page(f"{place}?{TRAINING}", names),
        "curves": Page(
            f"{place}?{TRAINING}&compareRunsMode=CHART",
            [*names, *CURVES],
            f"^({'|'.join(CURVES)})$",
            lambda browser: browser.execute_script(DRAWN, len(names)) == len(CURVES),
        ),
        "compare": Page(
            f'{uri}/#/compare-runs?runs={ids}&experiments=["{number}"]',
            [*names, "Comparing", "data.path"],
        ),
        "artifacts": Page(
            f"{place}/{runs[names[-1]]}/artifacts/curve.png",
            ["curve.png", "config.yaml"],
            shows=lambda browser: bool(browser.execute_script(LOADED)),
        ),
        "model": Page(f"{uri}/#/models/{model}", [model, "Version 1", "samples_seen"]),
    }


def prepare(browser: Chrome) -> None:
    """Chooses "Model training" and closes the assistant, as a visitor would by two clicks."""
    script = "".join(
        f"localStorage.setItem({json.dumps(key)}, {json.dumps(value)});"
        for key, value in SETTINGS.items()
    )
    # Before a page's own scripts: these open the assistant at some later moment.
    source = f"if (location.protocol.startsWith('http')) {{ {script} }}"
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})


def open_page(browser: Chrome, page: Page) -> None:
    """Opens a page and waits until it shows what it is for.

    Raises:
        TimeoutException: it does not.
    """
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import element_to_be_clickable
    from selenium.webdriver.support.wait import WebDriverWait

    wait = WebDriverWait(browser, SECONDS)
    browser.get("about:blank")  # else another #fragment of the same page would load nothing
    browser.get(page.address)
    if page.charts:
        box = (By.CSS_SELECTOR, "input[placeholder='Search metric charts']")
        wait.until(element_to_be_clickable(box)).send_keys(page.charts)

    def seen(browser: Chrome) -> bool:
        text = browser.execute_script("return document.body.innerText")
        return all(wanted in text for wanted in page.texts) and page.shows(browser)

    wait.until(seen, f"{page.address} does not show {page.texts}")


def keep(browser: Chrome, path: Path) -> None:
    """Writes what is seen now, in 128 colours: a quarter of the bytes, and text as sharp."""
    from PIL import Image

    with Image.open(BytesIO(browser.get_screenshot_as_png())) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names of runs")
    parser.add_argument("--model", required=True, help="a registered model")
    parser.add_argument("--experiment", default="seer-scale")
    parser.add_argument("--uri", default="http://127.0.0.1:5000")
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--all", action="store_true", help="every page, not only what docs/ shows")
    options = parser.parse_args()
    with chromium(WIDTH, HEIGHT) as browser:
        prepare(browser)
        found = pages(options.uri, options.experiment, options.runs, options.model)
        for name, page in found.items():
            open_page(browser, page)
            if options.all or name in KEPT:
                path = options.out / f"mlflow_{name}.png"
                keep(browser, path)
                print(path)


if __name__ == "__main__":
    main()
