"""Labelled images as batches of tensors, decoded ahead in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as V

from seer_scale import distributed
from seer_scale.data import Source
from seer_scale.data.augment import CropParameters, MultiCrop, Pixels, distort, normalise
from seer_scale.data.crops import cut_crops
from seer_scale.data.decode import BadImage, cause_of, decode
from seer_scale.data.order import sample_rng
from seer_scale.errors import DataError

_AHEAD = 2  # batches that are decoded while one is computed
_TEST_SHARE = 256 / 224  # the shorter side of a test image is this much larger than the crop
_TRAINING_SCALE = (0.08, 1.0)


def centre_crop(source: Source, index: int, size: int) -> Pixels:
    """The protocol's test image, uint8 [size, size, 3]: shorter side 256/224 * size, its middle.

    Raises:
        DataError: naming an image that cannot be read or decoded.
    """
    image = decoded(source, index)
    resized = V.resize(image, round(size * _TEST_SHARE), V.InterpolationMode.BILINEAR)
    return np.array(V.center_crop(resized, size))


def training_crop(source: Source, index: int, size: int, seed: int, position: int) -> Pixels:
    """A random resized crop with a flip, uint8 [size, size, 3].

    Args:
        source: the images.
        index: which of them.
        size: side of the crop.
        seed: of the augmentation.
        position: place in the stream of all epochs; with the seed it decides what is drawn.

    Raises:
        DataError: naming an image that cannot be read or decoded.
    """
    plain = MultiCrop([size], [1], [_TRAINING_SCALE], color_distortion=0.0, blur_probability=0.0)
    try:
        (crop,), (drawn,) = cut_crops(
            source.read(index), partial(plain.draw, sample_rng(seed, position))
        )
    except (BadImage, OSError) as error:
        raise unusable(source, index, error) from error
    return distort(crop, _only_flipped(drawn))


def batches(
    groups: Iterable[Sequence[int]], make: Callable[[int], Pixels]
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Each group with its images, normalised float32 [len(group), 3, size, size].

    Args:
        groups: numbers of images, batch by batch.
        make: gives the pixels of one number; called in threads.
    """
    with ThreadPoolExecutor(_threads()) as pool:
        waiting: list[tuple[Sequence[int], list[Future[Pixels]]]] = []
        try:
            for group in groups:
                waiting.append((group, [pool.submit(make, number) for number in group]))
                if len(waiting) > _AHEAD:
                    yield _collect(*waiting.pop(0))
            while waiting:
                yield _collect(*waiting.pop(0))
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()


def _collect(group: Sequence[int], futures: list[Future[Pixels]]) -> tuple[Sequence[int], Tensor]:
    pixels = np.stack([future.result() for future in futures])  # [B, size, size, 3]
    return group, normalise(torch.from_numpy(pixels))


def _threads() -> int:
    """The cores of this node divided among its ranks."""
    return max(1, len(os.sched_getaffinity(0)) // distributed.local_world_size())


def _only_flipped(drawn: CropParameters) -> CropParameters:
    return CropParameters(
        drawn.size, drawn.box, drawn.flip, None, drawn.jitter_order, grayscale=False, blur=0.0
    )


def decoded(source: Source, index: int) -> Image.Image:
    """An image, whole.

    Raises:
        DataError: naming one that cannot be read or decoded.
    """
    try:
        return decode(source.read(index))
    except (BadImage, OSError) as error:
        raise unusable(source, index, error) from error


def unusable(source: Source, index: int, error: BadImage | OSError) -> DataError:
    """What is raised for an image that cannot be read or decoded."""
    return DataError(
        f"{source.name(index)} cannot be used ({cause_of(error)}): remove or replace it"
    )
