"""What `bench` compares: this loader's host, and the loaders and transforms in common use.

All make SEER's six crops of an image: two of 160 pixels and four of 96.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from seer_scale.data.augment import MultiCrop, distort, normalise
from seer_scale.data.crops import cut_crops
from seer_scale.data.loader import build_loader
from seer_scale.data.order import sample_rng
from seer_scale.data.sources import open_source
from seer_scale.preprocessing import MEAN, STD

_CROP_SIZES, _CROP_COUNTS, _CROP_SCALES = (160, 96), (2, 4), ((0.14, 1.0), (0.05, 0.14))


class HostCrops:
    """What one image costs this loader's host: `augment` to the end, or for the device to do it."""

    def __init__(self, *, augment: bool) -> None:
        self._augment = augment
        self._multi_crop = MultiCrop(_CROP_SIZES, _CROP_COUNTS, _CROP_SCALES)
        self._calls = itertools.count()

    def __call__(self, data: bytes) -> object:
        """Crops in uint8, or normalised tensors of every resolution."""
        rng = sample_rng(0, next(self._calls))
        crops, parameters = cut_crops(data, partial(self._multi_crop.draw, rng))
        if not self._augment:
            return crops
        distorted = iter([distort(*pair) for pair in zip(crops, parameters, strict=True)])
        return [
            normalise(torch.from_numpy(np.stack(list(itertools.islice(distorted, count)))))
            for count in _CROP_COUNTS
        ]


def pil_transform() -> Callable[[Image.Image], list[Any]]:
    """SwAV's released composition: every crop by itself, to normalised tensors."""
    from torchvision import transforms

    jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    crops: list[Callable[[Image.Image], Any]] = []
    for size, count, scale in zip(_CROP_SIZES, _CROP_COUNTS, _CROP_SCALES, strict=True):
        steps = [
            transforms.RandomResizedCrop(size, scale=scale),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            _blur_sometimes,
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
        crops += [transforms.Compose(steps)] * count
    return partial(_apply_each, crops)


def _apply_each(
    transforms: Sequence[Callable[[Image.Image], Any]], image: Image.Image
) -> list[Any]:
    return [transform(image) for transform in transforms]


def _blur_sometimes(image: Image.Image) -> Image.Image:
    if torch.rand(()) >= 0.5:
        return image
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))


def lightly_transform() -> Callable[[Image.Image], list[Any]]:
    """Lightly's SwAV augmentation with the same crops, to normalised tensors."""
    from lightly.transforms import SwaVTransform

    smallest, largest = zip(*_CROP_SCALES, strict=True)
    transform: Callable[[Image.Image], list[Any]] = SwaVTransform(
        crop_sizes=_CROP_SIZES,
        crop_counts=_CROP_COUNTS,
        crop_min_scales=smallest,
        crop_max_scales=largest,
    )
    return transform


def through_pillow(
    transform: Callable[[Image.Image], list[Any]],
) -> Callable[[bytes], object]:
    """Decodes an image once, as torchvision's ImageFolder does, and makes its crops."""
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


@contextmanager
def torch_batches(folder: str, workers: int, batch: int) -> Iterator[Iterator[object]]:
    """torch's DataLoader over torchvision's ImageFolder and `pil_transform`.

    Its workers end with the last reference to the iterator.
    """
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder

    images = ImageFolder(folder, transform=pil_transform())
    # One epoch without end: a new one would start its workers again.
    sampler = RandomSampler(images, replacement=True, num_samples=10**9)
    loader: Any = DataLoader(images, batch, sampler=sampler, num_workers=workers)
    yield iter(loader)


@contextmanager
def our_batches(folder: str, workers: int, batch: int) -> Iterator[Iterator[object]]:
    """This loader over the same folder."""
    with build_loader(
        open_source(folder),
        MultiCrop(_CROP_SIZES, _CROP_COUNTS, _CROP_SCALES),
        seed=0,
        micro_batch_size=batch,
        workers=workers,
    ) as batches:
        yield batches
