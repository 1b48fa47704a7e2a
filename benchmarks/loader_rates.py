"""Images per second and core, of this loader and of others: `seer-scale data bench`.

Every pipeline makes the same crops (SwAV's by default) of the same JPEGs in memory, in one thread.
Its time is processor time, so that other programs on the core do not count. The two loaders read
the JPEGs from a folder with one worker per core; their time is wall-clock time. Pipelines take
turns, so that a machine that becomes slower does so for all of them, and the median turn counts.
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

from benchmarks.loader_pipelines import (
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
    "decode",  # decodes the whole image at full size, nothing else
    "host_crops",  # the host's part of this loader when the device augments
    "host_all",  # all of this loader on the host, to normalised tensors
    "pil",  # torchvision on Pillow, as SwAV's released code composes it
    "lightly",  # lightly's SwaVTransform, if lightly is installed
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
"""Opens an endless stream of batches, given folder, crops, workers and images per batch."""


class ImageSet(NamedTuple):
    """Encoded JPEGs that are measured together under one name."""

    name: str
    files: list[bytes]


class Row(NamedTuple):
    """One measurement: images per second and core."""

    images: str
    pipeline: str
    images_per_second: float


def photograph_sets(sizes: Sequence[tuple[int, int]] = SIZES) -> list[ImageSet]:
    """Encodes eight real photographs in each (width, height) as JPEGs of quality 90.

    Raises:
        DataError: the packages with the photographs are not installed.
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
    """Reads up to 16 evenly spaced JPEGs of a folder, under the folder's name.

    Raises:
        DataError: the folder has no JPEG that the fast decoder accepts.
    """
    root = Path(folder)
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    files: list[bytes] = []
    # Evenly spaced, so that a folder sorted by size or origin is sampled fairly.
    for path in paths[:: max(1, len(paths) // _MOST_FILES)][:_MOST_FILES]:
        data = path.read_bytes()
        try:
            simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:  # without `decode` there would be nothing to compare with
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
    """Measures every installed pipeline; returns rows in the order of `PIPELINES`.

    Args:
        images: the JPEGs.
        crops: the crops to make of each image.
        seconds: approximate time for each row; a turn goes over all images at least once.
        say: takes a sentence about each row that is missing.
    """
    with _one_thread():
        rates = _rates_in_memory(images.files, crops, seconds, say)
        rates |= _rates_of_loaders(images.files, crops, seconds)
    return [Row(images.name, name, rates[name]) for name in PIPELINES if name in rates]


def table(rows: Sequence[Row]) -> str:
    """Formats rows as text, with ratios to the PIL pipeline of the same kind and to `decode`."""
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
        pipeline(files[0])  # the first call imports and allocates
    turns: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(TURNS):
        for name, pipeline in pipelines.items():
            turns[name].append(_rate(pipeline, files, seconds / TURNS))
    return {name: statistics.median(rates) for name, rates in turns.items()}


def _rate(pipeline: Callable[[bytes], object], files: Sequence[bytes], seconds: float) -> float:
    """Returns images per second of processor time, over whole rounds of `files`."""
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
        photographs = Path(folder, "photographs")  # ImageFolder needs a class
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
    """Returns images per second after the batches prefetched at the start are used up."""
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
    """Limits torch and OpenCV to one thread, for rates per core."""
    torch_threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        cv2.setNumThreads(cv2_threads)
