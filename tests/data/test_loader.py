"""The order and content of micro-batches: whatever the ranks and workers, the same stream."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from harness.jobs import ROOT
from seer_scale.data.augment import MultiCrop, distort
from seer_scale.data.batches import MAX_REPLACEMENTS, BadSample
from seer_scale.data.crops import cut_crops
from seer_scale.data.device import finish
from seer_scale.data.device_augment import pack
from seer_scale.data.image_kinds import LeftOut
from seer_scale.data.loader import build_loader
from seer_scale.data.order import Order, sample_rng
from seer_scale.errors import STOP_SIGNALS, DataError

IMAGES = 10
TRANSFORM = MultiCrop((8, 4), (2, 3))


def encode(image: Any, kind: Any = "PNG") -> Any:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


class Memory:
    """A source of byte strings; a missing one cannot be read."""

    version = "memory"

    def __init__(self, data: Any, shard_sizes: Any = None) -> None:
        self.data = data
        self.shard_sizes = np.array([len(data)] if shard_sizes is None else shard_sizes)

    def __len__(self) -> Any:
        return len(self.data)

    def read(self, index: Any) -> Any:
        if self.data[index] is None:
            raise FileNotFoundError(2, "No such file or directory")
        return self.data[index]

    def name(self, index: Any) -> Any:
        return f"image-{index}"

    def label(self, index: Any) -> Any:
        return None


def picture(index: Any) -> Any:
    pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def source() -> Any:
    return Memory([encode(picture(index)) for index in range(IMAGES)])


def loader(
    source: Any,
    *,
    batch: Any = 4,
    accumulation: Any = 1,
    rank: Any = 0,
    world: Any = 1,
    first: Any = 0,
    workers: Any = 0,
    **more: Any,
) -> Any:
    return build_loader(
        source,
        TRANSFORM,
        seed=3,
        micro_batch_size=batch,
        gradient_accumulation=accumulation,
        rank=rank,
        world_size=world,
        first_sample=first,
        workers=workers,
        **more,
    )


def take(batches: Any, count: Any) -> Any:
    with batches:
        return [next(batches) for _ in range(count)]


def by_sample(micro_batch: Any) -> Any:
    """`(id, crops of that sample)` for every sample of a crop-major micro-batch."""
    size = len(micro_batch.sample_ids)
    split = [crops.unflatten(0, (-1, size)) for crops in micro_batch.crops]
    return [
        (int(sample), [crops[:, place] for crops in split])
        for place, sample in enumerate(micro_batch.sample_ids)
    ]


def assert_same(ones: Any, others: Any) -> None:
    assert len(ones) == len(others)
    for (one, crops), (other, other_crops) in zip(ones, others, strict=True):
        assert one == other
        assert all(torch.equal(a, b) for a, b in zip(crops, other_crops, strict=True))


def order_of(source: Any) -> Any:
    return Order(source.shard_sizes, seed=3, version=source.version)


def crops_of(data: Any, position: Any) -> Any:
    """The crops of one image at a position of the stream, per resolution, without a loader."""
    rng = sample_rng(3, position)
    cut, parameters = cut_crops(data, lambda width, height: TRANSFORM.draw(rng, width, height))
    crops = [torch.from_numpy(distort(*pair)) for pair in zip(cut, parameters, strict=True)]
    return [torch.stack(crops[:2]), torch.stack(crops[2:])]


def stream(source: Any, count: Any) -> Any:
    """The first `count` samples, computed without a loader."""
    order = order_of(source)
    indices = [order.index(order.place(position)) for position in range(count)]
    return [(index, crops_of(source.data[index], at)) for at, index in enumerate(indices)]


def test_batches_are_crop_major_and_follow_the_order(source: Any) -> None:
    batches = take(loader(source), 6)  # beyond two epochs
    for batch in batches:
        assert [tuple(c.shape) for c in batch.crops] == [(8, 8, 8, 3), (12, 4, 4, 3)]
        assert all(c.dtype == torch.uint8 and c.is_contiguous() for c in batch.crops)
        done = finish(batch, torch.device("cpu"))
        assert [tuple(c.shape) for c in done.crops] == [(8, 3, 8, 8), (12, 3, 4, 4)]
        assert all(c.dtype == torch.float32 for c in done.crops)
        assert batch.sample_ids.dtype == torch.int64
        assert batch.bad == []
    assert_same([s for batch in batches for s in by_sample(batch)], stream(source, 24))


def test_an_image_looks_different_in_every_epoch(source: Any) -> None:
    seen: dict[int, list[Any]] = {}
    for sample, crops in [s for b in take(loader(source), 5) for s in by_sample(b)]:
        seen.setdefault(sample, []).append(crops[0])
    assert all(len(views) == 2 for views in seen.values())
    assert not any(torch.equal(*views) for views in seen.values())


@pytest.mark.parametrize(
    ("world", "batch", "accumulation"),
    [(1, 12, 1), (1, 4, 3), (2, 6, 1), (2, 3, 2), (3, 2, 2), (3, 4, 1), (4, 1, 3)],
)
def test_every_world_and_accumulation_gives_the_same_global_batches(
    source: Any, world: Any, batch: Any, accumulation: Any
) -> None:
    steps = 2
    ranks = [
        take(
            loader(source, batch=batch, accumulation=accumulation, rank=rank, world=world),
            steps * accumulation,
        )
        for rank in range(world)
    ]
    in_order = [s for together in zip(*ranks, strict=True) for b in together for s in by_sample(b)]
    assert_same(in_order, stream(source, 12 * steps))


@pytest.mark.parametrize("augment_on", ["host", "device"])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(source: Any, workers: Any, augment_on: Any) -> None:
    damaged = Memory([*source.data[:-1], b"broken"])
    expected = take(loader(damaged, augment_on=augment_on), 6)
    batches = take(loader(damaged, workers=workers, augment_on=augment_on), 6)
    for one, other in zip(batches, expected, strict=True):
        assert_same(by_sample(one), by_sample(other))
        assert one.bad == other.bad


@pytest.mark.parametrize("step", [1, 2, 5])
def test_resume_from_a_cursor_equals_going_on(source: Any, step: Any) -> None:
    whole = take(loader(source, world=2, rank=1, accumulation=2), 12)
    resumed = take(loader(source, world=2, rank=1, accumulation=2, first=step * 16), 12 - 2 * step)
    for one, other in zip(whole[2 * step :], resumed, strict=True):
        assert_same(by_sample(one), by_sample(other))


def test_global_generators_are_left_alone(source: Any) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(loader(source), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_device_is_told_what_is_left_to_do(source: Any) -> None:
    (batch,) = take(loader(source, augment_on="device"), 1)
    order = order_of(source)
    for place in range(4):
        rng = sample_rng(3, place)
        data = source.data[order.index(order.place(place))]
        cut, drawn = cut_crops(data, partial(TRANSFORM.draw, rng))
        rows = [*batch.crops[0][place::4], *batch.crops[1][place::4]]
        assert all(np.array_equal(row, crop) for row, crop in zip(rows, cut, strict=True))
        packed = torch.cat([part[place::4] for part in batch.parameters])
        assert torch.equal(packed, pack(drawn))
    done = finish(batch, torch.device("cpu"))
    assert done.parameters is None
    assert [tuple(c.shape) for c in done.crops] == [(8, 3, 8, 8), (12, 3, 4, 4)]


def test_broken_images_are_replaced_named_and_counted(source: Any) -> None:
    data = list(source.data)
    jpeg = encode(picture(0), "JPEG")
    broken = {1: b"", 2: b"<html>", 5: jpeg[:-50], 8: None, 9: data[9][:200]}
    causes = {
        1: "zero bytes",
        2: "not an image",
        5: "truncated",
        8: "unreadable: No such file or directory",
        9: "truncated",
    }
    for index, content in broken.items():
        data[index] = content
    damaged = Memory(data, [5, 5])
    runs = [take(loader(damaged, batch=5, window=1), 2) for _ in range(2)]

    order = Order(damaged.shard_sizes, seed=3, version="memory", window=1)
    samples = [s for batch in runs[0] for s in by_sample(batch)]
    expected_bad = []
    for position, (used, crops) in enumerate(samples):
        place = order.place(position)
        candidates = [order.index(place, skip) for skip in range(5)]
        skipped = list(itertools.takewhile(broken.__contains__, candidates))
        assert used == candidates[len(skipped)]
        assert used // 5 == candidates[0] // 5  # of the same window: here, of the same shard
        # augmented with the generator of the place that is filled
        expected = crops_of(data[used], position)
        assert all(torch.equal(a, b) for a, b in zip(crops, expected, strict=True))
        expected_bad += [BadSample(f"image-{i}", causes[i]) for i in skipped]
    assert [bad for batch in runs[0] for bad in batch.bad] == expected_bad
    assert {bad.name for bad in expected_bad} == {f"image-{i}" for i in broken}
    assert all(len(batch.sample_ids) == 5 for batch in runs[0])
    for one, other in zip(*runs, strict=True):
        assert_same(by_sample(one), by_sample(other))
        assert one.bad == other.bad


PIXEL = encode(Image.new("RGB", (1, 1)))


class Many:
    """A hundred thousand images, all of one pixel."""

    shard_sizes, version, left_out = np.full(100, 1000), "many", LeftOut()

    def __len__(self) -> Any:
        return 100_000

    def read(self, index: Any) -> Any:
        return PIXEL

    def name(self, index: Any) -> Any:
        return str(index)

    def label(self, index: Any) -> Any:
        return None


WORLDS, WORKERS = (1, 2, 3, 4, 8), (0, 1, 3)


@pytest.mark.parametrize(
    ("images", "cases"),
    [
        (960, [*((world, 0) for world in WORLDS), (2, 1), (1, 3)]),
        pytest.param(
            10_000, [*itertools.product(WORLDS, WORKERS)], marks=pytest.mark.slow, id="all"
        ),
    ],
)
def test_the_ids_are_the_same_whatever_the_ranks_and_workers(images: Any, cases: Any) -> None:
    source, transform, global_batch = Many(), MultiCrop((1,), (1,), ((0.5, 1.0),)), 48
    steps = -(-images // global_batch)
    streams = {}
    for world, workers in cases:
        ranks = []
        for rank in range(world):
            batches = build_loader(
                source,
                transform,
                seed=9,
                micro_batch_size=global_batch // world,
                rank=rank,
                world_size=world,
                workers=workers,
            )
            ranks.append([batch.sample_ids for batch in take(batches, steps)])
        ids = torch.cat([part for together in zip(*ranks, strict=True) for part in together])
        streams[world, workers] = ids[:images].tolist()
    assert len(set(streams[1, 0])) == images
    assert all(ids == streams[1, 0] for ids in streams.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_images_is_one_sentence(workers: Any) -> None:
    with (
        loader(Memory([b"x"] * (MAX_REPLACEMENTS + 50)), workers=workers) as batches,
        pytest.raises(DataError) as caught,
    ):
        next(batches)
    assert str(caught.value).startswith(f"{MAX_REPLACEMENTS} images in a row cannot be used")
    assert "image-" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stop_signals_are_the_trainers_and_close_ends_the_worker(source: Any) -> None:
    batches = loader(source, workers=2)
    next(batches)
    worker = batches.worker.process
    for signum in STOP_SIGNALS:
        os.kill(worker.pid, signum)
    for _ in range(10):
        next(batches)
    assert worker.is_alive()
    batches.close()
    batches.close()
    assert not psutil.pid_exists(worker.pid)
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.long
def test_a_stop_signal_to_all_processes_at_once_leaves_the_loader_alone(source: Any) -> None:
    """What a batch system does: the trainer's process group hears the signal, servers included."""
    code = (
        "import os, signal\n"
        "from tests.data.test_loader import IMAGES, Memory, encode, loader, picture\n"
        "if __name__ == '__main__':\n"
        "    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):\n"
        "        signal.signal(number, lambda *_: None)\n"
        "    source = Memory([encode(picture(index)) for index in range(IMAGES)])\n"
        "    with loader(source, workers=1) as batches:\n"
        "        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):\n"
        "            os.killpg(0, number)\n"
        "            for _ in range(10):\n"
        "                next(batches)\n"
        "    with loader(source, workers=1) as batches:  # the same fork server\n"
        "        next(batches)\n"
        "    print('all there')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        start_new_session=True,
        check=False,
    )
    assert done.stdout == "all there\n", done.stderr


def _be_killed(source: Any, pipe: Any) -> None:
    batches = loader(source, workers=2)
    next(batches)
    pipe.send(batches.worker.process.pid)
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_when_the_trainer_is_killed(source: Any) -> None:
    """Their parent process, the fork server, lives on here."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    trainer = context.Process(target=_be_killed, args=(source, there))
    trainer.start()
    worker = here.recv()
    trainer.join(60)
    assert trainer.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while psutil.pid_exists(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(worker)
