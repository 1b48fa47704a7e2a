"""Labelled images as a classifier takes them: random crops to train on, middle crops to judge by.

What is drawn is a function of (seed, position in the training's stream) alone, so that every world
size trains on the same crops. Threads decode ahead of the training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as V

from seer_scale.data import MultiCrop
from seer_scale.data.augment import distort, normalise
from seer_scale.data.crops import cut_crops
from seer_scale.data.decode import BadImage, decode
from seer_scale.data.order import order_key, permute_all, sample_rng
from seer_scale.evaluation.datasets.labelled import LabelledImages
from seer_scale.evaluation.reading import unusable

SCALE = (0.08, 1.0)  # share of the image's area, as in torchvision's RandomResizedCrop
_AHEAD = 3  # batches that are made ahead

# An encoded image and its position in the stream, to float32 [3, size, size].
Transform = Callable[[bytes, int], Tensor]


@dataclass(frozen=True)
class TrainCrop:
    """A random resized crop, flipped half the time; SwAV's colours and blur where asked for.

    Attributes:
        size: side of the crop in pixels.
        seed: of all that is drawn.
        colour_distortion: strength of the colour jitter; 0 leaves colours, gray ones too, alone.
        blur: share of the crops that are blurred.
        bicubic: interpolate as VISSL's recipe for 384 pixels does; bilinear else.
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
        """Float32 [3, size, size] of an encoded image."""
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


@dataclass(frozen=True)
class MiddleCrop:
    """The middle of the image, whose shorter side becomes `resize` pixels.

    Attributes:
        size: side of the crop in pixels.
        resize: of the shorter side, before the crop.
        bicubic: interpolation; bilinear else.
    """

    size: int
    resize: int
    bicubic: bool = False

    def __call__(self, data: bytes, position: int) -> Tensor:
        """Float32 [3, size, size] of an encoded image, wherever it stands."""
        mode = V.InterpolationMode.BICUBIC if self.bicubic else V.InterpolationMode.BILINEAR
        image = V.resize(decode(data), self.resize, mode)
        return normalise(torch.from_numpy(np.array(V.center_crop(image, self.size))))


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The order of `count` images in an epoch: [count], a function of seed and epoch."""
    return permute_all(count, order_key(seed, "fine-tuning", epoch))


def batches(
    images: LabelledImages,
    parts: Iterable[list[tuple[int, int]]],
    transform: Transform,
    *,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images float32 [B, 3, H, W] and targets int64 [B] of each part.

    Args:
        images: where they come from.
        parts: for every batch, per image its place among `images` and its position in the stream.
        transform: makes what the classifier sees.
        workers: threads that decode.

    Raises:
        DataError: if an image cannot be read or decoded; names it.
    """
    waiting: deque[tuple[list[Future[Tensor]], list[int]]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for part in parts:
                futures = [
                    pool.submit(_load, images, place, position, transform)
                    for place, position in part
                ]
                waiting.append((futures, [place for place, _ in part]))
                if len(waiting) == _AHEAD:
                    yield _collect(images, *waiting.popleft())
            while waiting:
                yield _collect(images, *waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _load(images: LabelledImages, place: int, position: int, transform: Transform) -> Tensor:
    index = int(images.indices[place])
    try:
        return transform(images.source.read(index), position)
    except (BadImage, OSError) as error:
        raise unusable(images.source, index, error) from error


def _collect(
    images: LabelledImages, futures: list[Future[Tensor]], places: list[int]
) -> tuple[Tensor, Tensor]:
    return torch.stack([future.result() for future in futures]), images.targets[places]
