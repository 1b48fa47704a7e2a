"""Refreshes of the collection during a run, and runs that are resumed around a refresh."""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from harness.jobs import arguments, lines, run_job, write_images
from harness.pool import Distributed
from seer_scale.data import open_source
from seer_scale.distributed.ports import free_port
from seer_scale.train.collection import Collection

STEPS, EVERY, SWAP_BEFORE = 20, 4, 12
COMMON = [
    *(f"train.steps={STEPS}", "checkpoint.every=5", "checkpoint.keep=9", "run.log_samples=true"),
    *("data.window=2", f"data.refresh=every {EVERY} steps", "optim.base_lr=0.05"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes seven tars of five images each."""
    folder = tmp_path_factory.mktemp("shards")
    images = sorted(write_images(folder / "images", 35).rglob("*.jpg"))
    for number in range(7):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for image in images[5 * number : 5 * number + 5]:
                tar.add(image, image.name)
    return folder


def write_manifest(path: Path, shards: Path, numbers: list[int], age_days: float = 1) -> None:
    published = (datetime.now(UTC) - timedelta(days=age_days)).isoformat()
    rows = [
        {
            "url": str(shards / f"{number}.tar"),
            "count": 5,
            "bytes": (shards / f"{number}.tar").stat().st_size,
            "published": published,
        }
        for number in numbers
    ]
    fresh = path.with_suffix(".fresh")
    fresh.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fresh.rename(path)


@contextmanager
def when_step(run_dir: Path, step: int, act: Callable[[], object]) -> Iterator[None]:
    """Calls `act` in a thread once the run has done `step` steps."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        samples = run_dir / "samples.jsonl"
        while time.monotonic() < deadline:
            if samples.exists() and samples.read_text().count("\n") >= step:
                act()
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


def turn_back(run_dir: Path, copy: Path, step: int) -> None:
    """Copies a run as it would be if killed some time after `step` was saved."""
    shutil.copytree(run_dir, copy)
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)


def flat(steps: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(steps))


def ids(run_dir: Path) -> list[list[int]]:
    return [line["samples"] for line in lines(run_dir, "samples.jsonl")]


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Any:
    """Returns folder and shards of a run whose manifest changes halfway; see `make_run`."""
    return tmp_path_factory.mktemp("refreshed"), shards


def make_run(distributed: Distributed, folder: Path, shards: Path) -> tuple[Path, list[str]]:
    manifest, run_dir = folder / "shards.jsonl", folder / "run"
    argv = arguments(manifest, run_dir, *COMMON)
    if not run_dir.exists():
        write_manifest(manifest, shards, [0, 1, 2, 3])
        swap = lambda: write_manifest(manifest, shards, [2, 3, 4, 5, 6])  # noqa: E731
        with when_step(run_dir, SWAP_BEFORE - EVERY + 1, swap):
            distributed(run_job, 2, argv)
    return run_dir, argv


@pytest.mark.long
def test_the_switch_is_at_one_sample_and_recorded(
    distributed: Distributed, refreshed: tuple[Path, Path]
) -> None:
    run_dir, _ = make_run(distributed, *refreshed)
    readings = lines(run_dir, "refreshes.jsonl")
    assert [reading["samples_seen"] for reading in readings] == [0, 32, 64, 96, 128, 160]
    versions = [reading["version"] for reading in readings]
    assert len(set(versions[:3])) == 1
    assert len(set(versions[3:])) == 1
    assert versions[2] != versions[3]
    assert [reading["images"] for reading in readings] == [20] * 3 + [25] * 3
    before, after = flat(ids(run_dir)[:12]), flat(ids(run_dir)[12:])
    # whole epochs of the old collection, then whole epochs of the new one
    assert sorted(before[:20]) == sorted(before[20:40]) == list(range(20))
    assert sorted(after[:25]) == sorted(after[25:50]) == list(range(25))
    state = [
        json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
        for step in (10, 15)
    ]
    assert [s["state"]["collection"]["origin"] for s in state] == [0, 96]


@pytest.mark.long
@pytest.mark.parametrize("step", [5, 10, 15])
def test_a_resumed_run_takes_the_same_turns(
    distributed: Distributed, refreshed: tuple[Path, Path], tmp_path: Path, step: int
) -> None:
    """A run resumes before and after the switch, although the manifest has changed since."""
    run_dir, _ = make_run(distributed, *refreshed)
    manifest, copy = refreshed[0] / "shards.jsonl", tmp_path / "copy"
    turn_back(run_dir, copy, step)
    write_manifest(manifest, refreshed[1], [1, 6])
    assert distributed(run_job, 2, [*arguments(manifest, copy, *COMMON), "--resume", "auto"])
    assert ids(copy) == ids(run_dir)
    assert [line["loss"] for line in lines(copy)] == [line["loss"] for line in lines(run_dir)]
    assert lines(copy, "refreshes.jsonl") == lines(run_dir, "refreshes.jsonl")


def test_a_manifest_that_cannot_be_read_keeps_the_present_one(
    distributed: Distributed, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest, run_dir = tmp_path / "shards.jsonl", tmp_path / "run"
    write_manifest(manifest, shards, [0, 1])
    with when_step(run_dir, 2, lambda: manifest.write_text("{")):
        distributed(run_job, 1, arguments(manifest, run_dir, *COMMON))
    assert {reading["images"] for reading in lines(run_dir, "refreshes.jsonl")} == {10}
    assert len(ids(run_dir)) == STEPS


@pytest.mark.long
def test_old_shards_leave(distributed: Distributed, shards: Path, tmp_path: Path) -> None:
    manifest, run_dir = tmp_path / "shards.jsonl", tmp_path / "run"
    write_manifest(manifest, shards, [0, 1], age_days=91)
    text = manifest.read_text()
    write_manifest(manifest, shards, [2, 3, 4], age_days=89)
    manifest.write_text(text + manifest.read_text())
    distributed(run_job, 1, arguments(manifest, run_dir, *COMMON))
    assert lines(run_dir, "refreshes.jsonl")[0]["images"] == 15
    kept = arguments(manifest, tmp_path / "kept", *COMMON, "data.max_age_days=null")
    distributed(run_job, 1, kept)
    assert lines(tmp_path / "kept", "refreshes.jsonl")[0]["images"] == 25
    write_manifest(manifest, shards, [0, 1], age_days=91)
    with pytest.raises(AssertionError, match="none of them published after"):
        distributed(run_job, 1, arguments(manifest, tmp_path / "none", *COMMON))


@pytest.mark.long
def test_mlflow_is_told_which_images_are_in_use(
    distributed: Distributed, shards: Path, tmp_path: Path
) -> None:
    """Of a manifest whose first three shards are too old, those of the other four."""
    manifest, run_dir = tmp_path / "shards.jsonl", tmp_path / "run"
    write_manifest(manifest, shards, [0, 1, 2], age_days=40)
    old = manifest.read_text()
    write_manifest(manifest, shards, [3, 4, 5, 6])
    manifest.write_text(old + manifest.read_text())
    nowhere = f"tracking.uri=http://127.0.0.1:{free_port()}"
    keys = ("data.refresh=every 9 steps", "data.max_age_days=30", "train.steps=1")
    distributed(run_job, 1, arguments(manifest, run_dir, nowhere, *keys))
    events = lines(run_dir, "tracking/spool.jsonl")
    (found,) = [event["dataset"] for event in events if event["kind"] == "dataset"]
    (in_use, *_) = lines(run_dir, "refreshes.jsonl")
    assert found["images"] == 4 * 5
    assert found["digest"] == in_use["version"] != open_source(str(manifest)).version


def test_a_refresh_needs_a_manifest(distributed: Distributed, shards: Path, tmp_path: Path) -> None:
    argv = arguments(shards / "{0..3}.tar", tmp_path / "run", *COMMON)
    with pytest.raises(AssertionError, match="is not a manifest of shards"):
        distributed(run_job, 1, argv)


def test_a_lost_version_is_named(
    distributed: Distributed, refreshed: tuple[Path, Path], tmp_path: Path
) -> None:
    run_dir, _ = make_run(distributed, *refreshed)
    manifest, copy = tmp_path / "shards.jsonl", tmp_path / "copy"
    turn_back(run_dir, copy, 5)
    shutil.rmtree(copy / "manifests")
    write_manifest(manifest, refreshed[1], [1, 6])
    argv = [*arguments(manifest, copy, *COMMON), "--resume", "auto"]
    with pytest.raises(AssertionError, match=r"DataError: .* version [0-9a-f]{16} of the coll"):
        distributed(run_job, 1, argv)


@pytest.mark.long
def test_other_images_than_saved_begin_a_new_epoch(
    distributed: Distributed, tmp_path: Path
) -> None:
    images, run_dir = write_images(tmp_path / "images", 24), tmp_path / "run"
    argv = arguments(images, run_dir, "run.log_samples=true")
    distributed(run_job, 1, [*argv, "train.steps=4"])
    write_images(tmp_path / "images", 26)
    distributed(run_job, 1, [*argv, "train.steps=12", "--resume", "auto"])
    assert sorted(flat(ids(run_dir)[4:])[:26]) == list(range(26))


def test_hours_are_counted_from_the_last_reading(shards: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "shards.jsonl"
    said: list[str] = []
    write_manifest(manifest, shards, [0, 1])
    collection = Collection(
        open_source(manifest),
        path=str(manifest),
        cache=None,
        run_dir=tmp_path / "run",
        refresh=(2, "hours"),
        max_age_days=90,
        saved=None,
        saved_run=tmp_path / "run",
        cursor=0,
        say=said.append,
    )
    assert not collection.due(step=1, cursor=8)
    collection._last_read -= 2 * 3600
    assert collection.due(step=2, cursor=16)
    assert not collection.refresh(16)  # nothing new
    assert not collection.due(step=3, cursor=24)
    write_manifest(manifest, shards, [1, 2, 3])
    collection._last_read -= 2 * 3600
    assert collection.due(step=4, cursor=32)
    assert collection.refresh(32)
    assert (collection.in_use.origin, len(collection.source)) == (32, 15)
    assert "from sample 32 on the collection is version" in said[-1]
