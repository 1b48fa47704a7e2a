"""The stream of images that a rank trains on, from the collection that is in use."""

from __future__ import annotations

from collections.abc import Callable

import torch

from seer_scale.data import DeviceBatches, MicroBatch, MicroBatchLoader
from seer_scale.train.collection import Collection
from seer_scale.train.state import TrainState


class ImageStream:
    """Micro-batches of this rank, on its device; reopened when the collection changes.

    Args:
        collection: collection that the run reads.
        state: progress of the run, which says the position; its `collection` is kept up to date.
        open_batches: opens the collection's micro-batches from a position of the stream on.
        device: device of this rank.
        memory_format: memory format of the crops.
    """

    def __init__(
        self,
        collection: Collection,
        state: TrainState,
        open_batches: Callable[[Collection, int], MicroBatchLoader],
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> None:
        self._collection, self._state, self._open_batches = collection, state, open_batches
        self._device, self._memory_format = device, memory_format
        self._open()

    def __next__(self) -> MicroBatch:
        """Returns the next micro-batch."""
        return next(self._on_device)

    def refresh_due(self) -> bool:
        """Whether rank 0 wants the manifest of shards read now; False on other ranks."""
        return self._collection.due(self._state.step, self._state.samples_seen)

    def refresh(self) -> None:
        """Reads the manifest of shards; every rank calls this method between the same two steps.

        Micro-batches that were prepared from another collection are dropped.
        """
        if self._collection.refresh(self._state.samples_seen):
            self.close()
            self._open()

    def close(self) -> None:
        """Ends the loader's processes."""
        self._batches.close()

    def _open(self) -> None:
        self._state.collection = self._collection.in_use
        self._batches = self._open_batches(self._collection, self._state.samples_seen)
        self._on_device = DeviceBatches(self._batches, self._device, self._memory_format)
