"""The pipeline of a loader: an image that never comes is named while the others wait."""

from __future__ import annotations

import os
import re
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from harness.jobs import write_images
from seer_scale.data.augment import MultiCrop
from seer_scale.data.batches import BatchMaker, MicroBatch
from seer_scale.data.loader import MicroBatchLoader
from seer_scale.data.order import Order, rank_positions
from seer_scale.data.pipeline import Pipeline, Stalled
from seer_scale.data.sources import open_source

SECONDS = 60


def a_pipeline(folder: Path, patience_s: float) -> Pipeline:
    source = open_source(folder)
    order = Order(source.shard_sizes, seed=0, version=source.version, window=1)
    transform = MultiCrop((8,), (2,), ((0.3, 1.0),))
    maker = BatchMaker(source, order, transform, seed=0, origin=0, augment_on="host")
    positions = partial(
        rank_positions, 0, micro_batch_size=4, gradient_accumulation=1, rank=0, world_size=1
    )
    return Pipeline(maker, positions, threads=2, ahead=0, patience_s=patience_s)


@pytest.fixture
def stalled(tmp_path: Path) -> Path:
    """A folder of four images, one of which became a pipe after it had been listed."""
    return sorted(write_images(tmp_path / "images", 4).rglob("*.jpg"))[2]


def replace_by_pipe(path: Path) -> bytes:
    data = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    return data


def feed(path: Path, data: bytes, after_s: float = 0) -> None:
    """Writes the image, `after_s` seconds after its reader has opened the pipe."""
    with path.open("wb") as pipe:
        time.sleep(after_s)
        pipe.write(data)


def test_an_image_that_does_not_come_is_named_until_it_comes(stalled: Path) -> None:
    made = a_pipeline(stalled.parents[1], 0.05)
    data = replace_by_pipe(stalled)
    items = iter(made)
    first, second = next(items), next(items)
    for item in (first, second):
        assert isinstance(item, Stalled)
        assert item.name == str(stalled)
    assert isinstance(first, Stalled)
    assert isinstance(second, Stalled)
    assert second.seconds >= first.seconds + 0.1 > 0.1  # the patience doubles
    threading.Thread(target=feed, args=(stalled, data), daemon=True).start()
    item = next(item for item in items if not isinstance(item, Stalled))
    assert isinstance(item, MicroBatch)
    assert sorted(item.sample_ids.tolist()) == [0, 1, 2, 3]
    assert item.bad == []


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_trainer_s_user_reads_its_name(
    stalled: Path, ahead: int, capfd: pytest.CaptureFixture[str]
) -> None:
    made = a_pipeline(stalled.parents[1], 0.25)
    data = replace_by_pipe(stalled)
    with MicroBatchLoader(made, ahead) as batches:
        threading.Thread(target=feed, args=(stalled, data, 2.5), daemon=True).start()
        assert len(next(batches).sample_ids) == 4
    said = capfd.readouterr().err
    # On a busy machine another image may be slow as well, and named first.
    assert re.search(rf"warning: rank 0 has been reading {stalled} for \d+ s: does its disk", said)
