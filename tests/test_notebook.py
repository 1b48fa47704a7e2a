"""The notebook in a kernel of its own, against a real MLflow server and a run that it knows."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import seer_scale
from harness.jobs import ROOT, arguments, write_images
from seer_scale.checkpoint import CheckpointReader
from seer_scale.data import open_source
from seer_scale.evaluation.features import prepare
from seer_scale.evaluation.labelled_crops import decoded
from seer_scale.evaluation.prototype_sheet import score_prototypes
from tests.tracking.test_delivery import Server, until

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
COPY, ORIGINAL = "copy.jpg", "000.jpg"
SIZE = 48
PROTOTYPES = 16  # of the recipe debug
NAMES = ("features", "neighbours", "scores", "gathered", "largest", "closest")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_there_is_one() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["registered_model"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    yield running
    running.kill()


def with_parameters(notebook: Any, values: dict[str, Any]) -> Any:
    """The notebook with other values in its first cell of code, and a last one that tells."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert [node.targets[0].id for node in ast.parse(first.source).body] == list(values)
    first.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    told = ", ".join(f"{name!r}: {name}.tolist()" for name in NAMES)
    tell = f"import json\nprint(json.dumps({{{told}, 'step': step}}))"
    notebook.cells.append(nbformat.v4.new_code_cell(tell))
    return notebook


@pytest.mark.long
@pytest.mark.launch
def test_it_shows_what_the_registered_trunk_computes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run_dir = write_images(tmp_path / "images", 12), tmp_path / "run"
    shutil.copy(folder / "class0" / ORIGINAL, folder / "class1" / COPY)
    until(server.healthy)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = arguments(
        folder, run_dir, f"tracking.uri={server.uri()}", "train.steps=4", "checkpoint.every=2",
        "optim.lr=0.5", "optim.larc=false", "optim.warmup_steps=0",  # two steps make a difference
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "seer_scale", "pretrain", *argv],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    # Version 1 is the trunk of step 2, so a notebook that took the newest checkpoint would fail.
    values = {
        "FOLDER": str(tmp_path),
        "SERVER": server.uri(),
        "MODEL": "models:/seer-debug/1",
        "IMAGES": str(folder),
        "SIZE": SIZE,
    }
    notebook = with_parameters(read(NOTEBOOKS[0]), values)
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, environment[name])
    client = NotebookClient(notebook, timeout=240, kernel_name="python3")
    client.execute(cwd=str(NOTEBOOKS[0].parent))

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    told = json.loads(outputs[-1].text)
    assert told["step"] == 2
    check_neighbours(folder, run_dir / "checkpoints" / "step_00000002", told)
    check_prototypes(run_dir / "checkpoints", told)


def check_neighbours(folder: Path, checkpoint: Path, told: dict[str, Any]) -> None:
    """By the checkpoint's own trunk, image by image, and by cosines in float64."""
    images, trunk = open_source(folder), seer_scale.load(checkpoint)
    with torch.inference_mode():
        expected = torch.cat(
            [trunk(prepare(decoded(images, n), SIZE)[None]) for n in range(len(images))]
        )
    features = np.array(told["features"])
    assert features.shape == (13, expected.shape[1])
    # Batches of another size add in another order.
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)

    unit = expected.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    neighbours = np.array(told["neighbours"])
    assert neighbours.shape == (13, 8)
    names = [Path(images.name(n)).name for n in range(len(images))]
    pair = {names.index(ORIGINAL), names.index(COPY)}
    for image, row in enumerate(neighbours):
        # The copy is as near as the image itself, up to rounding.
        assert set(row[:2]) == pair if image in pair else row[0] == image
        found, best = cosines[image, row], np.sort(cosines[image])[::-1][:8]
        np.testing.assert_allclose(found, best, atol=1e-5)  # float32 against float64


def check_prototypes(checkpoints: Path, told: dict[str, Any]) -> None:
    """Scores are those of the model's own step; what is counted and shown follows from them."""
    scores = np.array(told["scores"])
    assert scores.shape == (13, PROTOTYPES)
    features = torch.tensor(told["features"])
    own, newest = (
        score_prototypes(CheckpointReader(checkpoints / f"step_{step:08d}"), features).numpy()
        for step in (2, 4)
    )
    np.testing.assert_allclose(scores, own, atol=1e-6)  # features went through JSON
    assert np.abs(scores - newest).max() > 1e-2
    counts = np.bincount(scores.argmax(1), minlength=PROTOTYPES)
    assert told["gathered"] == counts.tolist()
    assert counts[told["largest"]].tolist() == sorted(counts, reverse=True)[:6]
    for prototype, row in zip(told["largest"], told["closest"], strict=True):
        best = np.sort(scores[:, prototype])[::-1][:8]
        assert scores[row, prototype].tolist() == best.tolist()
