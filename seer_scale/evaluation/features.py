"""Features of labelled images, one forward pass each, without augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import functional as V

from seer_scale.data import Source
from seer_scale.data.augment import normalise
from seer_scale.errors import DataError
from seer_scale.evaluation.reading import decoded


def prepare(image: Image.Image, size: int) -> Tensor:
    """The middle of the image, shorter side `size`: normalised float32 [3, size, size]."""
    resized = V.resize(image, size, V.InterpolationMode.BICUBIC)
    pixels = torch.from_numpy(np.array(V.center_crop(resized, size)))  # [size, size, 3]
    return normalise(pixels)


def _batches(source: Source, size: int, batch_size: int) -> Iterator[Tensor]:
    count = -(-len(source) // batch_size)
    for indices in np.array_split(np.arange(len(source)), count):
        yield torch.stack([prepare(decoded(source, int(index)), size) for index in indices])


@torch.no_grad()
def measure_batch_norm(
    trunk: nn.Module, source: Source, *, size: int, batch_size: int = 64
) -> None:
    """Sets the running statistics of every BatchNorm to the mean over batches of `source`."""
    norms = [m for m in trunk.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
    training, momenta = trunk.training, [norm.momentum for norm in norms]
    trunk.train()
    for count, batch in enumerate(_batches(source, size, batch_size), start=1):
        for norm in norms:
            norm.momentum = 1 / count  # the running value becomes the mean so far
        trunk(batch.to(next(trunk.parameters()).device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    trunk.train(training)


@torch.inference_mode()
def extract_features(
    trunk: nn.Module, source: Source, *, size: int, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Features float32 [N, C] of every image, and class indices int64 [N].

    Classes are numbered in the sorted order of the labels' text, so that two sources of the same
    classes agree.

    Raises:
        DataError: if an image has no label.
    """
    device = next(trunk.parameters()).device
    labels = [source.label(index) for index in range(len(source))]
    if None in labels:
        raise DataError(
            f"{source.name(labels.index(None))} has no label: put images into one folder per class,"
            " or a .cls file beside each in the shards"
        )
    classes = {name: index for index, name in enumerate(sorted({str(name) for name in labels}))}
    features = [
        trunk(batch.to(device)).float().cpu() for batch in _batches(source, size, batch_size)
    ]
    return torch.cat(features), torch.tensor([classes[str(name)] for name in labels])
