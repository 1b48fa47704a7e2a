"""Crops of labelled images, cut in threads a few batches ahead; random crops to train on.

A random crop is a function of (seed, position in the stream of all epochs) alone, so that training
sees the same crops under any number of processes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seer_scale import distributed
from seer_scale.data import MultiCrop, Source
from seer_scale.data.augment import distort, normalise
from seer_scale.data.crops import cut_crops
from seer_scale.data.decode import BadImage, cause_of, decode
from seer_scale.data.order import sample_rng
from seer_scale.errors import DataError
from seer_scale.evaluation.datasets.labelled import LabelledImages

SCALE = (0.08, 1.0)  # share of the image's area, as in torchvision's RandomResizedCrop
AHEAD = 3  # batches that are made at the same time

Item = TypeVar("Item")
Made = TypeVar("Made")

# Makes float32 [3, size, size] from an encoded image and its position in the stream.
Crop = Callable[[bytes, int], Tensor]


@dataclass(frozen=True)
class TrainCrop:
    """Random resized crop, flipped with probability one half.

    Attributes:
        size: side of the crop in pixels.
        seed: seed of everything that is drawn.
        colour_distortion: strength of SwAV's colour jitter; 0 draws neither jitter nor grayscale.
        blur: share of the crops that are blurred.
        bicubic: interpolate bicubically, as VISSL's recipe for 384 pixels, instead of bilinearly.
    """

    size: int
    seed: int
    colour_distortion: float = 0.0
    blur: float = 0.0
    bicubic: bool = False

    @cached_property
    def _crops(self) -> MultiCrop:
        return MultiCrop([self.size], [1], [SCALE], self.colour_distortion, self.blur)

    def __call__(self, data: bytes, position: int) -> Tensor:
        """Returns the normalised crop float32 [3, size, size] of an encoded image."""
        rng = sample_rng(self.seed, position)
        if self.bicubic:
            image = decode(data)
            (drawn,) = self._crops.draw(rng, image.width, image.height)
            crop = np.array(
                image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=drawn.box)
            )
        else:
            (crop,), (drawn,) = cut_crops(data, lambda w, h: self._crops.draw(rng, w, h))
        if not self.colour_distortion:
            drawn = replace(drawn, grayscale=False)
        return normalise(torch.from_numpy(np.ascontiguousarray(distort(crop, drawn))))


def crop_batches(
    images: LabelledImages,
    batches: Iterable[Sequence[tuple[int, int]]],
    crop: Crop,
    *,
    workers: int | None = None,
    instead: Callable[[int, BadImage | OSError], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields crops float32 [B, 3, size, size] and targets int64 [B] of each batch.

    Args:
        images: images to crop.
        batches: for each image of a batch, its place among `images` and its position in the stream.
        crop: makes one crop; runs in threads.
        workers: number of threads; None means the cores of this node divided by its ranks.
        instead: makes the crop of an image that cannot be used, from its place and the reason.

    Raises:
        DataError: an image cannot be read or decoded, without `instead`; the sentence names it.
    """

    def make(entry: tuple[int, int]) -> tuple[int, Tensor]:
        place, position = entry
        index = int(images.indices[place])
        try:
            return place, crop(images.source.read(index), position)
        except (BadImage, OSError) as error:
            if instead is not None:
                return place, instead(place, error)
            raise _unusable(images.source, index, error) from error

    for made in make_ahead(batches, make, workers=workers):
        places, crops = zip(*made, strict=True)
        yield torch.stack(crops), images.targets[list(places)]


def make_ahead(
    batches: Iterable[Sequence[Item]],
    make: Callable[[Item], Made],
    *,
    workers: int | None = None,
) -> Iterator[list[Made]]:
    """Yields what `make` returns for the items of each batch, up to `AHEAD` batches ahead.

    Args:
        batches: items of every batch; may have no end.
        make: runs in threads.
        workers: number of threads; None means the cores of this node divided by its ranks.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) // distributed.local_world_size()
    waiting: deque[list[Future[Made]]] = deque()
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        for batch in batches:
            waiting.append([pool.submit(make, item) for item in batch])
            if len(waiting) == AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        # What is being read is not waited for: an error or a Ctrl-C must not stand still with it.
        pool.shutdown(wait=False, cancel_futures=True)


def decoded(source: Source, index: int) -> Image.Image:
    """Returns a whole image in RGB.

    Raises:
        DataError: the image cannot be read or decoded; the sentence names the image.
    """
    try:
        return decode(source.read(index))
    except (BadImage, OSError) as error:
        raise _unusable(source, index, error) from error


def _unusable(source: Source, index: int, error: BadImage | OSError) -> DataError:
    return DataError(
        f"{source.name(index)} cannot be used ({cause_of(error)}): remove or replace it"
    )
