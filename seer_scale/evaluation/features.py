"""Features of whole image sources, one forward pass per batch, without augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seer_scale.data import Source
from seer_scale.data.middle_crop import MiddleCrop
from seer_scale.errors import DataError
from seer_scale.evaluation.datasets.labelled import LabelledImages
from seer_scale.evaluation.labelled_crops import crop_batches


def tight_crop(size: int) -> MiddleCrop:
    """Returns the crop whose side is the shorter side of the resized image; bicubic."""
    return MiddleCrop(size, size, bicubic=True)


def prepare(image: Image.Image, size: int) -> Tensor:
    """Returns the `tight_crop` of a decoded image: normalised float32 [3, size, size]."""
    return tight_crop(size).cut(image)


def _batches(source: Source, size: int, batch_size: int) -> Iterator[Tensor]:
    count = -(-len(source) // batch_size)
    parts = np.array_split(np.arange(len(source)), count)
    batches = ([(int(place), 0) for place in part] for part in parts)
    for crops, _ in crop_batches(LabelledImages.whole(source), batches, tight_crop(size)):
        yield crops


@torch.no_grad()
def measure_batch_norm(
    trunk: nn.Module, source: Source, *, size: int, batch_size: int = 64
) -> None:
    """Sets the running statistics of every BatchNorm to their mean over the batches of `source`."""
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
    """Returns features float32 [N, C] of every image, and class indices int64 [N].

    Classes are numbered in the sorted order of the labels' text, so that two sources of the same
    classes agree.

    Raises:
        DataError: an image has no label, or cannot be read or decoded.
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
