"""A registered trunk behind MLflow's own model server, asked over HTTP; and what it needs there."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision import transforms

from seer_scale.distributed.ports import free_port
from seer_scale.models import build_trunk
from seer_scale.serving import export_trunk
from seer_scale.tracking.quiet import quieten
from tests.tracking.test_delivery import until

pytestmark = [pytest.mark.launch, pytest.mark.long, pytest.mark.timeout(600)]

SIZE = 64
# What torch and Pillow import where it happens to be installed.
OPTIONAL = {"setuptools", "tqdm", "colorama", "defusedxml", "coverage"}


@pytest.fixture(scope="module")
def trunk() -> nn.Module:
    torch.manual_seed(0)
    made = build_trunk("regnety_debug")
    made(torch.randn(4, 3, 64, 64))
    return made.eval()


@pytest.fixture(scope="module")
def packed(trunk: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run logs as a model."""
    quieten()
    from seer_scale.tracking.mlflow_client.packing import pack

    folder = tmp_path_factory.mktemp("served")
    made = {"crop_sizes": [SIZE, 32], "crop_counts": [2, 4]}
    exported = export_trunk(trunk, folder / "trunk", trunk="regnety_debug", pretraining=made)
    config = json.loads((exported / "config.json").read_text())
    pack(folder / "packed", exported, config, "a" * 32, "m-" + "b" * 32)
    return folder / "packed"


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[str]:
    """The address of `mlflow models serve --env-manager local`, as docs/mlflow.md starts it."""
    port = free_port()
    command = ["models", "serve", "--env-manager", "local", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with (packed.parent / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command, "--model-uri", str(packed)],
            env=environment,
            cwd=packed.parent,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (packed.parent / "server.log").read_text()
        try:
            with urlopen(f"{address}/ping", timeout=5):
                return True
        except OSError:
            return False

    try:
        until(answers, 400)
        yield address
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def ask(address: str, body: dict[str, Any]) -> Any:
    head = {"Content-Type": "application/json"}
    request = Request(f"{address}/invocations", json.dumps(body).encode(), head)
    with urlopen(request, timeout=120) as answer:
        return np.array(json.load(answer)["predictions"])


def test_the_server_answers_jpegs_and_numbers_and_reads_no_files(
    server: str, packed: Path, trunk: nn.Module
) -> None:
    small = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    photograph = packed.parent / "a.jpg"
    Image.fromarray(small).resize((150, 100), Image.Resampling.BICUBIC).save(photograph)
    show = transforms.Compose(
        [
            transforms.Resize(round(SIZE * 256 / 224)),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    shown = show(ImageOps.exif_transpose(Image.open(photograph)))[None]
    with torch.inference_mode():
        expected = trunk(shown).numpy()
    encoded = base64.b64encode(photograph.read_bytes()).decode()
    for body in (
        {"inputs": [encoded]},
        {"dataframe_split": {"columns": ["image"], "data": [[encoded]]}},
        {"inputs": shown.tolist()},
    ):
        np.testing.assert_allclose(ask(server, body), expected, rtol=1e-4, atol=1e-5)
    example = json.loads((packed / "serving_input_example.json").read_text())
    assert ask(server, example).shape == expected.shape
    with pytest.raises(HTTPError) as caught:
        ask(server, {"inputs": [str(photograph)]})
    assert caught.value.code == 400
    assert "not base64" in caught.value.read().decode()


def test_the_requirements_hold_all_that_the_models_code_imports(packed: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1] + '/code')\n"
        "from seer_scale import serving; from importlib.metadata import packages_distributions\n"
        "import base64, json, pathlib\n"
        "example = json.loads(pathlib.Path(sys.argv[1], 'input_example.json').read_text())\n"
        "serving._load_pyfunc(sys.argv[1] + '/data/trunk').predict(example)\n"
        "known = packages_distributions()\n"
        "print(*{d for name in sys.modules if '.' not in name for d in known.get(name, ())})"
    )
    command = [sys.executable, "-I", "-c", code, str(packed)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stated = (packed / "requirements.txt").read_text().split()
    assert all("==" in line for line in stated)
    reached: set[str] = set()
    waiting = [line.split("==")[0] for line in stated]
    while waiting:
        name = plain(waiting.pop())
        if name not in reached:
            reached.add(name)
            waiting += needed_by(name)
    imported = {plain(name) for name in done.stdout.split()} - {"seer-scale", *OPTIONAL}
    assert imported <= reached, imported - reached


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by(name: str) -> list[str]:
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:  # of another platform
        return []
    return [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
