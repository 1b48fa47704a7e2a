"""The state that a save writes: where the training has it, until the training changes it.

Weights and momenta change only when the optimizer steps. Until then they are written from the
training's own memory; what is not written by then is copied first. So where a step takes longer
than the writing, the training waits for no copy and no memory is taken for one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seer_scale.storage.tensor_file import Kind, as_bytes, copy_bytes


class Staging:
    """Tensors by key, each in the training's own memory or in a copy.

    One thread fills and copies; another reads.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}  # for copies; reused by every save
        self._now: dict[str, Tensor] = {}  # what is to be written, wherever it is
        self._live: dict[str, int] = {}  # how often what is in the training's memory is to be read
        self._lock = threading.Lock()

    def copy(self, key: str, source: Tensor) -> None:
        """Takes a copy, on the CPU; without waiting for the GPU it may come from."""
        target = self._memory.get(key)
        if target is None or target.shape != source.shape or target.dtype != source.dtype:
            target = torch.empty(
                source.shape, dtype=source.dtype, pin_memory=source.device.type == "cuda"
            )
        self._memory[key] = self._now[key] = target
        target.copy_(source.detach(), non_blocking=True)

    def hold(self, key: str, source: Tensor, reads: int) -> None:
        """Takes a contiguous tensor on the CPU without a copy, until it has been read `reads`
        times or `copy_live` is called.
        """
        self._now[key] = source.detach()
        self._live[key] = reads

    def keep(self, key: str, own: Tensor) -> None:
        """Takes a contiguous tensor on the CPU that nobody else has."""
        self._now[key] = own.detach()

    @property
    def live(self) -> bool:
        """Whether anything that the training has is still to be read."""
        return bool(self._live)

    def copy_live(self) -> None:
        """Copies what the training has and is still to be read; from here on it may change."""
        with self._lock:
            for key in self._live:
                self.copy(key, self._now[key])
            self._live.clear()

    def clear(self) -> None:
        """Forgets what there was to write; the memory of copies stays for the next save."""
        with self._lock:
            self._now.clear()
            self._live.clear()

    def free(self, keep: Iterable[str] = ()) -> None:
        """Gives up the memory of copies, but for these keys."""
        self._memory = {key: self._memory[key] for key in self._memory.keys() & set(keep)}

    def kinds(self) -> dict[str, Kind]:
        """What there is to write."""
        return {key: Kind.of(tensor) for key, tensor in self._now.items()}

    def fill(self, key: str, start: int, target: NDArray[np.uint8]) -> None:
        """A tensor's bytes from `start` on, as `tensor_file.stream_tensors` asks for them."""
        with self._lock:
            source = self._now[key]
            copy_bytes(as_bytes(source), start, target)
            if key in self._live and start + len(target) == source.nbytes:
                self._live[key] -= 1
                if not self._live[key]:
                    del self._live[key]
