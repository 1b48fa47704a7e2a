"""One micro-batch from its positions in the stream: read, decode, cut, and distort if it is asked.

Broken images are replaced by the next good one of their window, so that batches stay full, and
reported. Everything follows from (seed, collection, position), whoever does it and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seer_scale.data.augment import CropParameters, MultiCrop, distort
from seer_scale.data.crops import cut_crops
from seer_scale.data.decode import BadImage, cause_of
from seer_scale.data.device_augment import pack
from seer_scale.data.order import Order, Place, sample_rng
from seer_scale.data.sources import Source
from seer_scale.errors import DataError

MAX_REPLACEMENTS = 100

Pixels = NDArray[np.uint8]


class BadSample(NamedTuple):
    """An image that could not be used, and why."""

    name: str
    cause: str


class MicroBatch(NamedTuple):
    """What one rank feeds through the model at once.

    Attributes:
        crops: one tensor per resolution, crop-major: crop 0 of all samples, then crop 1 of all
            samples. From a loader uint8 `[count * B, size, size, 3]`; for the model, once
            `device.finish` is through with it, float32 `[count * B, 3, size, size]`.
        parameters: `[count * B, P]` per resolution, what is still to be done with each crop on the
            device; None if the host has done all.
        sample_ids: `[B]` int64, the numbers of the images that were really read.
        bad: the images that were replaced.
    """

    crops: list[Tensor]
    parameters: list[Tensor] | None
    sample_ids: Tensor
    bad: list[BadSample]


class Sample(NamedTuple):
    """One image's crops, in the order of the transform's resolutions."""

    crops: list[Pixels]
    parameters: list[CropParameters]
    id: int
    bad: list[BadSample]


class BatchMaker:
    """Makes micro-batches of a collection; used by several threads at once.

    Args:
        source: where the images come from.
        order: which of them stands where.
        transform: draws the crops.
        seed: of the augmentation.
        origin: position in the stream at which this collection came into use.
        augment_on: who distorts the crops' colours: the host here, or the device later.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        transform: MultiCrop,
        *,
        seed: int,
        origin: int,
        augment_on: Literal["host", "device"],
    ) -> None:
        self._source, self._order, self._transform = source, order, transform
        self._seed, self._origin, self._augment_on = seed, origin, augment_on

    def start(self, positions: Sequence[int], pool: Executor) -> list[Future[Sample]]:
        """Has the samples of a micro-batch made by a pool of threads."""
        return [pool.submit(self.sample, position) for position in positions]

    def sample(self, position: int) -> Sample:
        """The crops of the sample at `position`, or of the next good image of its window.

        Raises:
            DataError: none of the next `MAX_REPLACEMENTS` images can be used.
        """
        place = self._order.place(position - self._origin)
        bad: list[BadSample] = []
        for skip in range(min(MAX_REPLACEMENTS, self._order.window_size(place))):
            index = self._order.index(place, skip)
            try:
                crops, parameters = self._crops(index, position)
            except (BadImage, OSError) as error:
                bad.append(BadSample(self._source.name(index), cause_of(error)))
            else:
                return Sample(crops, parameters, index, bad)
        raise self._hopeless(place, bad)

    def _crops(self, index: int, position: int) -> tuple[list[Pixels], list[CropParameters]]:
        rng = sample_rng(self._seed, position)
        crops, parameters = cut_crops(
            self._source.read(index), lambda width, height: self._transform.draw(rng, width, height)
        )
        if self._augment_on == "host":
            crops = [distort(crop, chosen) for crop, chosen in zip(crops, parameters, strict=True)]
        return crops, parameters

    def _hopeless(self, place: Place, bad: list[BadSample]) -> DataError:
        return DataError(
            f"{len(bad)} images in a row cannot be used, the last one is {bad[-1].name}"
            f" ({bad[-1].cause}), in window {place.window} of epoch {place.epoch}: check data.path"
        )

    def join(self, samples: Sequence[Sample]) -> MicroBatch:
        """A micro-batch of samples, crop-major."""
        crops: list[Tensor] = []
        parameters: list[Tensor] = []
        first = 0
        for size, count in zip(self._transform.sizes, self._transform.counts, strict=True):
            places = [(crop, sample) for crop in range(first, first + count) for sample in samples]
            pixels = torch.empty((len(places), size, size, 3), dtype=torch.uint8)
            view = pixels.numpy()
            for row, (crop, sample) in zip(view, places, strict=True):
                row[:] = sample.crops[crop]
            crops.append(pixels)
            if self._augment_on == "device":
                parameters.append(pack([sample.parameters[crop] for crop, sample in places]))
            first += count
        return MicroBatch(
            crops,
            parameters or None,
            torch.tensor([sample.id for sample in samples]),
            [bad for sample in samples for bad in sample.bad],
        )
