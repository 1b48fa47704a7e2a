"""The pipelines of `loader_rates`: this loader's host, and loaders and transforms in common use.

All of them make the same `Crops` of an image.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter

from seer_scale.data.augment import MultiCrop, distort, normalise
from seer_scale.data.crops import cut_crops
from seer_scale.data.loader import build_loader
from seer_scale.data.order import sample_rng
from seer_scale.data.sources import open_source
from seer_scale.preprocessing import MEAN, STD

_LARGEST_SIDE = 1024


class Crops(NamedTuple):
    """Crops of two resolutions: sides in pixels, counts, and SwAV's ranges of the area."""

    sizes: tuple[int, int]
    counts: tuple[int, int]
    scales: tuple[tuple[float, float], tuple[float, float]] = ((0.14, 1.0), (0.05, 0.14))

    @classmethod
    def parse(cls, text: str) -> Crops:
        """Parses a text such as `2x224+6x96`.

        Raises:
            ValueError: the text has another form or a size outside 1 to 1024.
        """
        found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)x(\d+)", text)
        numbers = [int(number) for number in found.groups()] if found else [0]
        if min(numbers) < 1 or max(numbers) > _LARGEST_SIDE:
            raise ValueError(f"{text!r} is not two numbers of crops and their sizes, as 2x224+6x96")
        return cls((numbers[1], numbers[3]), (numbers[0], numbers[2]))


class HostCrops:
    """The host's part of this loader; without `augment`, the device would do the rest."""

    def __init__(self, crops: Crops, *, augment: bool) -> None:
        self._augment, self._counts = augment, crops.counts
        self._multi_crop = MultiCrop(*crops)
        self._calls = itertools.count()

    def __call__(self, data: bytes) -> object:
        """Makes the crops: uint8 arrays, or normalised tensors of every resolution."""
        rng = sample_rng(0, next(self._calls))
        crops, parameters = cut_crops(data, partial(self._multi_crop.draw, rng))
        if not self._augment:
            return crops
        distorted = iter([distort(*pair) for pair in zip(crops, parameters, strict=True)])
        return [
            normalise(torch.from_numpy(np.stack(list(itertools.islice(distorted, count)))))
            for count in self._counts
        ]


def pil_transform(crops: Crops) -> Callable[[Image.Image], list[Any]]:
    """Builds the transform of SwAV's released code: each crop by itself, to normalised tensors."""
    from torchvision import transforms

    jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    of_crops: list[Callable[[Image.Image], Any]] = []
    for size, count, scale in zip(*crops, strict=True):
        steps = [
            transforms.RandomResizedCrop(size, scale=scale),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            _blur_sometimes,
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
        of_crops += [transforms.Compose(steps)] * count
    return partial(_apply_each, of_crops)


def _apply_each(
    transforms: Sequence[Callable[[Image.Image], Any]], image: Image.Image
) -> list[Any]:
    return [transform(image) for transform in transforms]


def _blur_sometimes(image: Image.Image) -> Image.Image:
    if torch.rand(()) >= 0.5:
        return image
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))


def lightly_transform(crops: Crops) -> Callable[[Image.Image], list[Any]]:
    """Builds lightly's SwAV augmentation with the same crops, to normalised tensors."""
    from lightly.transforms import SwaVTransform

    smallest, largest = zip(*crops.scales, strict=True)
    transform: Callable[[Image.Image], list[Any]] = SwaVTransform(
        crop_sizes=crops.sizes,
        crop_counts=crops.counts,
        crop_min_scales=smallest,
        crop_max_scales=largest,
    )
    return transform


def through_pillow(
    transform: Callable[[Image.Image], list[Any]],
) -> Callable[[bytes], object]:
    """Puts a decoder like that of torchvision's ImageFolder before a transform."""
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


@contextmanager
def torch_batches(
    folder: str, crops: Crops, workers: int, batch: int
) -> Iterator[Iterator[object]]:
    """Opens torch's DataLoader over torchvision's ImageFolder and `pil_transform`.

    Its workers end with the last reference to the iterator.
    """
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder

    images = ImageFolder(folder, transform=pil_transform(crops))
    # One endless epoch, since each epoch starts the workers again.
    sampler = RandomSampler(images, replacement=True, num_samples=10**9)
    loader: Any = DataLoader(images, batch, sampler=sampler, num_workers=workers)
    yield iter(loader)


@contextmanager
def our_batches(folder: str, crops: Crops, workers: int, batch: int) -> Iterator[Iterator[object]]:
    """Opens this loader over the same folder."""
    with build_loader(
        open_source(folder),
        MultiCrop(*crops),
        seed=0,
        micro_batch_size=batch,
        workers=workers,
    ) as batches:
        yield batches
