"""Images per second and core, of this loader and of what it is compared with.

Every pipeline makes the same crops, SwAV's unless told others, of the same JPEGs in memory, in one
thread, by its processor time: other programs' share of the core is not counted. The two loaders
read them from a folder with a worker per core, by the clock. Pipelines take turns, so that a
machine that gets slower does so for all, and the median turn counts.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import simplejpeg
import torch
from PIL import Image, ImageOps

from seer_scale.data.bench_pipelines import (
    Crops,
    HostCrops,
    lightly_transform,
    our_batches,
    pil_transform,
    through_pillow,
    torch_batches,
)
from seer_scale.data.generate.tiles import PHOTOGRAPHS, load_photographs
from seer_scale.errors import DataError

SIZES = ((500, 375), (1600, 1200), (4000, 3000))
PIPELINES = (
    "decode",  # the whole image at full size, nothing else
    "host_crops",  # this loader's host when the device augments
    "host_all",  # this loader's host when it augments itself, to normalised tensors
    "pil",  # torchvision on Pillow, as SwAV's released code composes it
    "lightly",  # its SwaVTransform, where it is installed
    "dataloader_pil",  # torch's DataLoader over torchvision's ImageFolder, with `pil`
    "dataloader_ours",  # this loader over the same folder
)
SECONDS = 3.0
SWAV_CROPS = "2x224+6x96"  # as SwAV was published; SEER makes 2x224+4x96, RG-10B 2x160+4x96

TURNS = 5
LOADER_TURNS = 3
_BATCH = 8
_MOST_FILES = 16
_COLOUR = ("astronaut", "chelsea", "coffee", "hubble", "retina", "rocket", "china", "flower")


OpenBatches = Callable[[str, Crops, int, int], AbstractContextManager[Iterator[object]]]
"""From a folder, crops, a number of workers and images per batch to batches without end."""


class ImageSet(NamedTuple):
    """Encoded JPEGs that are measured together, under one name."""

    name: str
    files: list[bytes]


class Row(NamedTuple):
    """One measured number; per second and core."""

    images: str
    pipeline: str
    images_per_second: float


def photograph_sets(sizes: Sequence[tuple[int, int]] = SIZES) -> list[ImageSet]:
    """Eight real photographs in each size, as JPEGs of quality 90.

    Raises:
        DataError: the packages that carry the photographs are missing.
    """
    named = zip((name for _, name in PHOTOGRAPHS), load_photographs(), strict=True)
    photographs = [image for name, image in named if any(word in name for word in _COLOUR)]
    sets = []
    for width, height in sizes:
        files = []
        for photograph in photographs:
            buffer = io.BytesIO()
            fitted = ImageOps.fit(photograph, (width, height), Image.Resampling.LANCZOS)
            fitted.save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
        sets.append(ImageSet(f"{width}x{height}", files))
    return sets


def folder_set(folder: str | os.PathLike[str]) -> ImageSet:
    """Up to 16 JPEGs from all over a folder, under the folder's name.

    Raises:
        DataError: it holds no JPEG that the fast decoder takes.
    """
    root = Path(folder)
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    files: list[bytes] = []
    # Evenly spaced, so that a folder sorted by size or origin is represented.
    for path in paths[:: max(1, len(paths) // _MOST_FILES)][:_MOST_FILES]:
        data = path.read_bytes()
        try:
            simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:  # what it refuses would have no `decode` to compare with
            continue
        files.append(data)
    if not files:
        raise DataError(
            f"--images {root} holds no JPEG that can be decoded: give a folder of .jpg files"
        )
    return ImageSet(root.resolve().name, files)


def measure(
    images: ImageSet,
    *,
    crops: Crops,
    seconds: float = SECONDS,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """A row for every pipeline that is installed, in the order of `PIPELINES`.

    Args:
        images: what is decoded.
        crops: what is made of each.
        seconds: for each row, about; a turn is never less than once over all images.
        say: gets a sentence about every row that is missing.
    """
    with _one_thread():
        rates = _rates_in_memory(images.files, crops, seconds, say)
        rates |= _rates_of_loaders(images.files, crops, seconds)
    return [Row(images.name, name, rates[name]) for name in PIPELINES if name in rates]


def table(rows: Sequence[Row]) -> str:
    """Rows as text, each beside the PIL pipeline of its kind and the decode-only limit."""
    rates = {(row.images, row.pipeline): row.images_per_second for row in rows}
    lines = [f"{'images':<12}{'pipeline':<17}{'images/s/core':>13}{'x PIL':>8}{'of decode':>11}"]
    for row in rows:
        loader = row.pipeline.startswith("dataloader")
        base = rates.get((row.images, "dataloader_pil" if loader else "pil"))
        limit = rates.get((row.images, "decode"))
        ratio = f"{row.images_per_second / base:.2f}" if base else ""
        share = f"{row.images_per_second / limit:.0%}" if limit else ""
        lines.append(
            f"{row.images:<12}{row.pipeline:<17}{row.images_per_second:>13.1f}{ratio:>8}{share:>11}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------- in one thread


def _rates_in_memory(
    files: Sequence[bytes], crops: Crops, seconds: float, say: Callable[[str], None]
) -> dict[str, float]:
    pipelines: dict[str, Callable[[bytes], object]] = {
        "decode": partial(simplejpeg.decode_jpeg, colorspace="RGB"),
        "host_crops": HostCrops(crops, augment=False),
        "host_all": HostCrops(crops, augment=True),
        "pil": through_pillow(pil_transform(crops)),
    }
    try:
        pipelines["lightly"] = through_pillow(lightly_transform(crops))
    except ImportError as error:
        say(f"no row for lightly, which is not installed ({error})")
    for pipeline in pipelines.values():
        pipeline(files[0])  # imports, tables and buffers of a first call
    turns: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(TURNS):
        for name, pipeline in pipelines.items():
            turns[name].append(_rate(pipeline, files, seconds / TURNS))
    return {name: statistics.median(rates) for name, rates in turns.items()}


def _rate(pipeline: Callable[[bytes], object], files: Sequence[bytes], seconds: float) -> float:
    """Images per second of processor time, over whole rounds of `files`."""
    images, took, began = 0, 0.0, time.process_time()
    while not images or took < seconds:
        for data in files:
            pipeline(data)
        images += len(files)
        took = time.process_time() - began
    return images / took


# ------------------------------------------------------------------------------- whole loaders


def _rates_of_loaders(files: Sequence[bytes], crops: Crops, seconds: float) -> dict[str, float]:
    cores = len(os.sched_getaffinity(0))
    loaders: dict[str, OpenBatches] = {
        "dataloader_pil": torch_batches,
        "dataloader_ours": our_batches,
    }
    turns: dict[str, list[float]] = {name: [] for name in loaders}
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder, "photographs")  # ImageFolder wants a class
        photographs.mkdir()
        for number, data in enumerate(files):
            (photographs / f"{number:03d}.jpg").write_bytes(data)
        for _ in range(LOADER_TURNS):
            for name, open_batches in loaders.items():
                rate = _steady_rate(open_batches, folder, crops, cores, seconds / LOADER_TURNS)
                turns[name].append(rate / cores)
    return {name: statistics.median(rates) for name, rates in turns.items()}


def _steady_rate(
    open_batches: OpenBatches, folder: str, crops: Crops, workers: int, seconds: float
) -> float:
    """Images per second once what was prefetched during the start is used up."""
    with open_batches(folder, crops, workers, _BATCH) as batches:
        for _ in range(2 * workers):
            next(batches)
        images, took, began = 0, 0.0, time.perf_counter()
        while not images or took < seconds:
            for _ in range(workers):  # batches of all workers come at about the same time
                next(batches)
            images += workers * _BATCH
            took = time.perf_counter() - began
        return images / took


@contextmanager
def _one_thread() -> Iterator[None]:
    """A rate per core needs libraries that use one."""
    torch_threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        cv2.setNumThreads(cv2_threads)
