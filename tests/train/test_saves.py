"""Checkpoints of a run: which one is best, and the trunk exported beside them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from harness.engines import build_engine, configuration
from harness.jobs import arguments, run_job
from harness.pool import Distributed
from seer_scale.checkpoint import CheckpointReader, list_checkpoints
from seer_scale.checkpoint.saving import Saver
from seer_scale.config import RunConfig
from seer_scale.convert.loading import load
from seer_scale.tracking import NullTracker, Tracker
from seer_scale.tracking.spool import SPOOL, read_events
from seer_scale.train import build
from seer_scale.train import saves as saves_module
from seer_scale.train.state import TrainState
from tests.train.runs import ZERO


def settings(run_dir: Path) -> RunConfig:
    config = configuration("model.trunk=regnety_debug")
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run_dir)})})


def test_a_checkpoint_of_no_finite_loss_is_not_the_best(tmp_path: Path) -> None:
    config, tracker, said = settings(tmp_path), Tracker(tmp_path), list[str]()
    engine = build_engine(config)[0]
    saves, state = build.saves_of(config, tracker, None, said.append), TrainState()
    best = []
    for step, seen in enumerate([[], [2.0], [], [3.0], [1.0, 1.5]], start=1):
        for loss in seen:
            saves.observe(loss)
        state.step = step
        saves.start(state, engine, {}, urgent=True)
        assert saves.finish() is None
        best.append(state.best_loss)
    assert best == [math.inf, 2.0, 2.0, 2.0, 1.25]
    assert said == []
    events = [event.fields for event in read_events(tracker.folder / SPOOL, 0)]
    models = [fields for fields in events if fields["kind"] == "model"]
    assert [fields["aliases"] for fields in models] == [[], ["best"], [], [], ["best"]]
    assert [fields["tags"].get("loss") for fields in models] == [None, "2", None, "3", "1.25"]


@pytest.mark.parametrize("evaluate_every", [None, 4])
def test_large_trunks_are_registered_where_somebody_looks_at_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluate_every: int | None
) -> None:
    monkeypatch.setattr(saves_module, "SMALL_TRUNK_BYTES", 1000)
    config, tracker = settings(tmp_path), Tracker(tmp_path)
    config = config.model_copy(
        update={
            "checkpoint": config.checkpoint.model_copy(update={"keep_every": 3}),
            "eval": config.eval.model_copy(update={"every": evaluate_every}),
            "train": config.train.model_copy(update={"steps": 7}),
        }
    )
    engine = build_engine(config)[0]
    saves = build.saves_of(config, tracker, None, lambda text: None)
    for step in range(1, 8):
        saves.start(TrainState(step=step), engine, {}, urgent=True)
        assert saves.finish() is None
    events = [event.fields for event in read_events(tracker.folder / SPOOL, 0)]
    registered = [fields["step"] for fields in events if fields["kind"] == "model"]
    assert registered == ([3, 6, 7] if evaluate_every is None else [3, 4, 6, 7])


def test_a_checkpoint_that_the_next_save_has_pruned_is_no_model(tmp_path: Path) -> None:
    """The run leaves while a save is under way: both are settled at its end."""
    config, tracker, said = settings(tmp_path), Tracker(tmp_path), list[str]()
    config = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"keep": 1})}
    )
    engine = build_engine(config)[0]
    saves = build.saves_of(config, tracker, None, said.append)
    for step in (1, 2):
        saves.start(TrainState(step=step), engine, {}, urgent=True, leaving=step == 2)
    assert saves.finish() is None
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000002"]
    events = [event.fields for event in read_events(tracker.folder / SPOOL, 0)]
    assert [fields["step"] for fields in events if fields["kind"] == "model"] == [2]
    assert said == []


@pytest.mark.parametrize(("leaving", "seconds"), [(False, math.inf), (True, 5.0)])
def test_a_run_that_leaves_gives_the_trunk_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaving: bool, seconds: float
) -> None:
    config, given = settings(tmp_path), []
    monkeypatch.setattr(Saver, "save", lambda _, **values: given.append(values["trunk_s"]))
    saves = build.saves_of(config, NullTracker(), None, lambda text: None)
    saves.start(TrainState(step=1), build_engine(config)[0], {}, urgent=True, leaving=leaving)
    assert given == [seconds]


def fail_to_save(run_dir: Path) -> str | None:
    """A save whose folder cannot be made; what this rank hears of it at the end."""
    config = settings(run_dir)
    saves = build.saves_of(config, NullTracker(), None, lambda text: None)
    saves.start(TrainState(step=1), build_engine(config)[0], {}, urgent=True)
    return saves.finish()


def test_every_rank_learns_that_the_last_save_failed(
    distributed: Distributed, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    problems = distributed(fail_to_save, 2, tmp_path)
    assert problems[0] == problems[1]
    assert "Not a directory" in problems[0]


@pytest.mark.long
def test_the_exported_trunk_is_the_checkpoint_s(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    distributed(run_job, 2, arguments(images, tmp_path / "run", *ZERO["zero3"]))
    folder = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    reader = CheckpointReader(folder)
    exported = load(folder).state_dict()
    assert len(exported) > 50
    for name, value in exported.items():
        assert torch.equal(value, reader.whole(f"trunk.{name}")), name
