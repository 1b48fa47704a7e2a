"""Makes a micro-batch from its positions in the stream: reads, decodes, cuts and distorts.

A broken image is reported and replaced by the next good one of its window, so that batches stay
full. The result depends only on (seed, collection, position).
"""

from __future__ import annotations

import time
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
    """An image that could not be used, and the cause."""

    name: str
    cause: str


class MicroBatch(NamedTuple):
    """The B images that one rank feeds through the model at once.

    Attributes:
        crops: one tensor per resolution, crop-major: crop 0 of all samples, then crop 1 of all
            samples. A loader gives uint8 [count * B, size, size, 3]; `device.finish` makes it
            float32 [count * B, 3, size, size] for the model.
        parameters: float32 [count * B, P] per resolution: the distortions that are left for the
            device; None if the host has done all of them.
        sample_ids: int64 [B], numbers of the images that were really read.
        bad: the images that were replaced.
    """

    crops: list[Tensor]
    parameters: list[Tensor] | None
    sample_ids: Tensor
    bad: list[BadSample]


class Sample(NamedTuple):
    """The crops of one image, in the order of the transform's resolutions."""

    crops: list[Pixels]
    parameters: list[CropParameters]
    id: int
    bad: list[BadSample]


class BatchMaker:
    """Makes micro-batches of a collection; several threads may use one maker at once.

    Args:
        source: the collection of images.
        order: the order of the images in the stream.
        transform: draws the parameters of the crops.
        seed: seed of the augmentation.
        origin: position in the stream at which this collection came into use.
        augment_on: where crops are distorted: on the host here, or later on the device.
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
        self._reading: dict[int, tuple[int, float]] = {}  # position -> image, and when it began
        self._fetched: dict[int, Future[bytes]] = {}  # position -> its image, read ahead

    def reading(self) -> tuple[int, float] | None:
        """Returns the number of the image that threads have been reading longest, and since when.

        The time is `time.monotonic`'s; None if no thread reads an image.
        """
        return min(list(self._reading.values()), key=lambda one: one[1], default=None)

    def name(self, index: int) -> str:
        """Returns the name of an image."""
        return self._source.name(index)

    def start(
        self, positions: Sequence[int], pool: Executor, fetchers: Executor | None = None
    ) -> list[Future[Sample]]:
        """Starts making the samples of a micro-batch in a pool of threads.

        Args:
            positions: positions of the samples in the stream.
            pool: threads that read, decode and cut.
            fetchers: threads that read ahead, for sources that wait for a server; or None.
        """
        if fetchers is not None:
            for position in positions:
                index = self._order.index(self._order.place(position - self._origin))
                self._fetched[position] = fetchers.submit(self._source.read, index)
        return [pool.submit(self.sample, position) for position in positions]

    def sample(self, position: int) -> Sample:
        """Makes the sample at `position`, from its image or the next good image of its window.

        Raises:
            DataError: `MAX_REPLACEMENTS` images in a row, or the whole window, cannot be used.
        """
        place = self._order.place(position - self._origin)
        bad: list[BadSample] = []
        for skip in range(min(MAX_REPLACEMENTS, self._order.window_size(place))):
            index = self._order.index(place, skip)
            self._reading[position] = (index, time.monotonic())
            try:
                fetched = self._fetched.pop(position, None)
                data = fetched.result() if fetched else self._source.read(index)
                crops, parameters = self._crops(data, position)
            except (BadImage, OSError) as error:
                bad.append(BadSample(self._source.name(index), cause_of(error)))
            else:
                return Sample(crops, parameters, index, bad)
            finally:
                del self._reading[position]
        raise self._hopeless(place, bad)

    def _crops(self, data: bytes, position: int) -> tuple[list[Pixels], list[CropParameters]]:
        rng = sample_rng(self._seed, position)
        crops, parameters = cut_crops(
            data, lambda width, height: self._transform.draw(rng, width, height)
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
        """Joins samples into a micro-batch, crop-major."""
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
