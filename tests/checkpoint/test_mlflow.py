"""Checkpoints as artifacts of an MLflow run, by reference or by copy, and back by the run's id."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seer_scale.checkpoint import choose, first_whole
from seer_scale.errors import UserError
from seer_scale.tracking import Tracker
from seer_scale.tracking.delivery import Delivery
from seer_scale.tracking.quiet import quieten
from seer_scale.tracking.spool import SETTINGS, write_json
from tests.checkpoint.test_checkpoint import trained, write

pytestmark = pytest.mark.launch


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    quieten()
    yield
    os.environ.clear()
    os.environ.update(before)


def log(run_dir: Path, uri: str, how: dict[int, str], prune: bool) -> str:
    """Logs a checkpoint per step as a run does and sends it all; the run's id."""
    tracker = Tracker(run_dir)
    settings = {"id": run_dir.name, "uri": uri, "experiment": "test"}
    names = {"registered_name": "test", "run_name": "test"}
    write_json(tracker.folder / SETTINGS, {**settings, **names, "system_metrics": False})
    tracker.start("test")
    for step, kind in how.items():
        folder = write(run_dir / "checkpoints", step, model=trained(seed=step), keep=9)
        tracker.log_checkpoint(folder, step=step, how=kind)
        if prune:  # before it is sent
            shutil.rmtree(folder)
    delivery = Delivery(tracker.folder, uri)
    while delivery.step():
        pass
    assert delivery.rejected == 0
    assert not list(tracker.folder.glob("checkpoints/*"))  # nothing waits any more
    assert delivery.run.run_id is not None
    return delivery.run.run_id


@pytest.mark.long
def test_a_run_is_resumed_by_its_id(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    fresh = tmp_path / "fresh"
    run_id = log(tmp_path / "one", uri, {1: "reference", 2: "reference", 3: "none"}, prune=False)
    root = tmp_path / "one" / "checkpoints"
    found = choose(f"mlflow:{run_id}", fresh, uri)
    assert found == [root / "step_00000002", root / "step_00000001"]
    with pytest.raises(UserError, match="already holds a run"):  # another run's folder
        choose(f"mlflow:{run_id}", _used(tmp_path / "used"), uri)
    assert choose(f"mlflow:{run_id}", tmp_path / "one", uri) == found  # its own
    shutil.rmtree(root)
    with pytest.raises(UserError, match=r"no checkpoint that is still there; tracking\.check"):
        choose(f"mlflow:{run_id}", fresh, uri)

    run_id = log(tmp_path / "two", uri, {1: "copy", 2: "copy"}, prune=True)
    (folder, *_) = choose(f"mlflow:{run_id}", fresh, uri)
    assert folder == fresh / "checkpoints" / "step_00000002"  # downloaded
    reader = first_whole([folder], print)
    assert reader is not None
    expected = trained(seed=2).get_parameter("prototypes.weight").detach()
    assert torch.equal(reader.whole("prototypes.weight"), expected)
    with pytest.raises(UserError, match="mlflow:0123: not to be had from sqlite"):
        choose("mlflow:0123", tmp_path / "other", uri)


def _used(run_dir: Path) -> Path:
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("")
    return run_dir
