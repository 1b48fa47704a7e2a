"""Micro-batches on the device, copied and augmented while the model computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from seer_scale.data.augment import normalise
from seer_scale.data.batches import MicroBatch
from seer_scale.data.device_augment import distort_batch


def finish(
    batch: MicroBatch,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> MicroBatch:
    """Moves crops to `device` and finishes them there: float32 [count * B, 3, size, size].

    The device distorts what the host did not, all crops of a resolution at once. The crops get the
    given memory format, which every layer of the trunk keeps.
    """
    crops = [crop.to(device, non_blocking=True) for crop in batch.crops]
    if batch.parameters is None:
        done = [normalise(crop) for crop in crops]
    else:
        parameters = [rows.to(device, non_blocking=True) for rows in batch.parameters]
        done = [distort_batch(crop, rows) for crop, rows in zip(crops, parameters, strict=True)]
    formatted = [crop.contiguous(memory_format=memory_format) for crop in done]
    return batch._replace(crops=formatted, parameters=None)


class DeviceBatches(Iterator[MicroBatch]):
    """Iterates over finished micro-batches; a GPU prepares one in advance, on its own stream."""

    def __init__(
        self,
        batches: Iterator[MicroBatch],
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._batches, self._device, self._format = batches, device, memory_format
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ahead: MicroBatch | None = None

    def __next__(self) -> MicroBatch:
        if self._stream is None:
            return finish(next(self._batches), self._device, self._format)
        batch = self._ahead or self._begin(self._stream)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for crop in batch.crops:
            crop.record_stream(current)  # so that its memory is not reused while the model reads
        self._ahead = self._begin(self._stream)
        return batch

    def _begin(self, stream: torch.cuda.Stream) -> MicroBatch:
        with torch.cuda.stream(stream):
            return finish(next(self._batches), self._device, self._format)
