"""A profiled run writes traces and tables of the chosen ranks that agree with the run's clock."""

from __future__ import annotations

import gc
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.jobs import RECIPES, arguments, lines, run_job, write_images
from harness.pool import Distributed
from seer_scale.config.recipe import parse
from seer_scale.errors import ConfigError
from seer_scale.performance.time_by_kind import CONV, NORM, OPTIMIZER, time_by_kind
from seer_scale.tracking.spool import SPOOL, Tracker, read_events
from seer_scale.train import build
from seer_scale.train.build_engine import check_run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def events_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        return list(json.load(file)["traceEvents"])


@pytest.mark.long
def test_the_kinds_add_up_to_the_steps(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    profile = ("profile.steps=[3,5]", "profile.ranks=[0,1]")
    distributed(run_job, 2, arguments(images, run_dir, *profile, "train.steps=6"))
    names = sorted(path.name for path in (run_dir / "profile").iterdir())
    assert names == [
        f"rank_0000{rank}.{suffix}" for rank in (0, 1) for suffix in ("md", "trace.json.gz")
    ]
    for rank in (0, 1):
        events = events_of(run_dir / "profile" / f"rank_0000{rank}.trace.json.gz")
        steps = {e["name"] for e in events if e["name"].startswith("train step")}
        assert steps == {"train step 3", "train step 4", "train step 5"}
        found = time_by_kind(events)
        assert sum(found.by_kind.values()) == pytest.approx(found.seconds)
        if rank == 0:  # the run's own clock, which runs within the step's range
            own = sum(line["step_time"] for line in lines(run_dir) if line["step"] in (3, 4, 5))
            assert found.seconds == pytest.approx(own, rel=0.05, abs=0.005)
        assert all(found.by_kind[kind] > 0 for kind in (CONV, NORM, OPTIMIZER))
    # Convolutions are where the trace has convolutions: their operators, as it stands there.
    backward = [e for e in events if e["name"] == "aten::convolution_backward"]
    forward = [e for e in events if e["name"] == "aten::conv2d"]
    operators = sum(e["dur"] for e in [*forward, *backward]) / 1e6
    assert found.by_kind[CONV] == pytest.approx(operators, rel=0.02)
    table = (run_dir / "profile" / "rank_00001.md").read_text()
    assert table.startswith("3 steps from step 3, rank 1, cpu")
    per_step = re.search(r"\| step \| (.*) \| 100.0% \|", table)
    assert per_step is not None
    assert float(per_step[1]) == pytest.approx(1000 * found.seconds / 3, abs=0.01)


def test_a_run_that_is_not_profiled_leaves_nothing(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    distributed(run_job, 1, arguments(images, tmp_path / "run", "train.steps=2"))
    assert not (tmp_path / "run" / "profile").exists()


def run_part(argv: list[str], steps: int) -> list[str]:
    """A run that is stopped while it is profiled; the files that it left."""
    from harness.jobs import open_trainer
    from seer_scale.train.stopping import Stop
    from seer_scale.train.trainer import StepResult

    trainer = open_trainer(argv)
    inner = trainer.train_step

    def step() -> StepResult:
        result = inner()
        done = trainer.state.step == steps
        return result._replace(stop=Stop.DONE if done else Stop.NO)

    trainer.train_step = step  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        trainer.close("KILLED")
    folder = trainer.run_dir / "profile"
    return sorted(path.name for path in folder.iterdir())


def test_a_run_that_is_stopped_leaves_what_it_has(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    argv = arguments(images, tmp_path / "run", "profile.steps=[1,7]")  # no step before the first
    assert distributed(run_part, 1, argv, 2) == [["rank_00000.md", "rank_00000.trace.json.gz"]]
    table = (tmp_path / "run" / "profile" / "rank_00000.md").read_text()
    assert table.startswith("2 steps from step 1, rank 0")


def test_files_go_to_the_tracker(tmp_path: Path) -> None:
    argv = arguments("nowhere", tmp_path / "run", "profile.steps=[2,2]")
    config = parse(argv, recipes=RECIPES, ranks=1).config
    tracker, said = Tracker(tmp_path / "run"), list[str]()
    profiler = build.profiler_of(config, torch.device("cpu"), tracker, said.append)
    for step in range(1, 5):
        with profiler.step(step):
            torch.nn.functional.conv2d(torch.zeros(1, 3, 64, 64), torch.zeros(8, 3, 3, 3))
    logged = [event.fields for event in read_events(tracker.folder / SPOOL, 0)]
    assert [(event["kind"], event["path"], event["folder"]) for event in logged] == [
        ("artifact", f"profile/rank_00000.{suffix}", "profile")
        for suffix in ("trace.json.gz", "md")
    ]
    assert len(said) == 1
    assert said[0].startswith("profiled 1 steps, ")
    # Of the steps around it nothing is left.
    events = events_of(tmp_path / "run" / logged[0]["path"])
    assert len([event for event in events if event["name"] == "aten::conv2d"]) == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("profile.steps=[5,3]", ["profile.steps is [5, 3]", "after the last", "[3, 5]"]),
        ("profile.steps=[3,9]", ["profile.steps is [3, 9]", "train.steps is 8"]),
        ("profile.steps=3", ["profile.steps is 3", "a pair of integers > 0"]),
        ("profile.steps=[0,3]", ["profile.steps is [0, 3]", "a pair of integers > 0"]),
        ("profile.ranks=[]", ["profile.ranks is []", "a list of integers >= 0"]),
    ],
)
def test_mistakes(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        parse(["--recipe", "debug", override], recipes=RECIPES, ranks=1)
    assert all(word in str(found.value) for word in words), found.value


def test_a_rank_that_is_not_there() -> None:
    argv = ["--recipe", "debug", "profile.steps=[1,2]", "profile.ranks=[0,4]"]
    config = parse(argv, recipes=RECIPES, ranks=1).config
    with pytest.raises(ConfigError, match=r"profile.ranks is \[0, 4\], but the run has 4 ranks"):
        check_run(config, None, world_size=4, local_world_size=4, cuda=False)
    check_run(config, None, world_size=5, local_world_size=5, cuda=False)


def collections_of(argv: list[str]) -> list[int]:
    """The step after which each collection of a run's garbage took place; -1 within a step."""
    from harness.jobs import open_trainer

    trainer = open_trainer(argv)
    inner, within, seen = trainer.train_step, [False], list[int]()

    def step() -> Any:
        within[0] = True
        try:
            # Enough to set off the automatic collection.
            rubbish: list[list[Any]] = [[] for _ in range(5000)]
            for item in rubbish:
                item.append(item)
            return inner()
        finally:
            within[0] = False

    def seen_by_gc(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            seen.append(-1 if within[0] else trainer.state.step)

    trainer.train_step = step  # type: ignore[method-assign]
    gc.callbacks.append(seen_by_gc)
    try:
        trainer.train()
    finally:
        gc.callbacks.remove(seen_by_gc)
        trainer.close("FINISHED")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    return seen


def test_garbage_is_collected_between_steps_on_all_ranks(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    argv = arguments(images, tmp_path / "run", "run.gc_every=3", "train.steps=7")
    assert distributed(collections_of, 2, argv) == [[3, 6], [3, 6]]
