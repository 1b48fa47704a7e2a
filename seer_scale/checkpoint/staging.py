"""State that a save writes: read in the training's own memory until the training changes it.

Weights and momenta change only when the optimizer steps. Until then they are written from the
training's own memory; the unwritten rest is copied before the step. If a step takes longer than the
writing, nothing is copied, and no memory is needed for copies.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.optim.pinned_memory import pinned
from seer_scale.optim.slices import Slice, buffers_without_padding
from seer_scale.storage.tensor_file import Kind, as_bytes, copy_bytes


class Staging:
    """Tensors by key, each in the training's own memory or in a copy.

    One thread fills and copies; another reads.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}  # for copies; reused by every save
        self._now: dict[str, Tensor] = {}  # tensors to write, in whichever memory
        self._live: dict[str, int] = {}  # reads left of tensors in the training's memory
        self._lock = threading.Lock()

    def reserve(self, sources: Mapping[str, Tensor], *, pin: bool = True) -> None:
        """Takes the memory for copies of float32 tensors at once, which needs the least of it.

        Args:
            sources: tensors that have the keys and the shapes.
            pin: take pinned memory, which needs CUDA.
        """
        new = {key: source for key, source in sources.items() if not self._fits(key, source)}
        self._memory.update(zip(new, pinned(list(new.values()), pin=pin), strict=True))

    def _fits(self, key: str, source: Tensor) -> bool:
        known = self._memory.get(key)
        return known is not None and (known.shape, known.dtype) == (source.shape, source.dtype)

    def copy(self, key: str, source: Tensor) -> None:
        """Copies a tensor to the CPU, without waiting for the GPU."""
        if self._fits(key, source):
            target = self._memory[key]
        else:
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
        """Takes over a contiguous tensor on the CPU that has no other owner."""
        self._now[key] = own.detach()

    @property
    def live(self) -> bool:
        """Tells whether tensors of the training are still unread."""
        return bool(self._live)

    def copy_live(self) -> None:
        """Copies the unread tensors of the training, which may then change them."""
        with self._lock:
            for key in self._live:
                self.copy(key, self._now[key])
            self._live.clear()

    def clear(self) -> None:
        """Forgets all tensors; keeps the memory of copies for the next save."""
        with self._lock:
            self._now.clear()
            self._live.clear()

    def free(self, keep: Iterable[str] = ()) -> None:
        """Frees the memory of copies, except for these keys."""
        self._memory = {key: self._memory[key] for key in self._memory.keys() & set(keep)}

    def kinds(self) -> dict[str, Kind]:
        """Kinds of the tensors to write, by key."""
        return {key: Kind.of(tensor) for key, tensor in self._now.items()}

    def fill(self, key: str, start: int, target: NDArray[np.uint8]) -> None:
        """Fills a buffer with a tensor's bytes from `start` on, for `tensor_file`."""
        with self._lock:
            source = self._now[key]
            copy_bytes(as_bytes(source), start, target)
            if key in self._live and start + len(target) == source.nbytes:
                self._live[key] -= 1
                if not self._live[key]:
                    del self._live[key]


@torch.no_grad()
def stage(
    staging: Staging,
    slices: Iterable[Slice],
    model: nn.Module,
    local_state: Mapping[str, Tensor],
    in_place: bool,
) -> dict[str, Any]:
    """Stages the state of this rank; returns the place of each slice in its tensor.

    Args:
        staging: emptied first.
        slices: this rank's master weights and momenta.
        model: for its buffers, which rank 0 writes.
        local_state: tensors that each rank has its own of.
        in_place: slices on the CPU are not copied until `Staging.copy_live` is called.
    """
    placement: dict[str, Any] = {}
    main = distributed.is_main()
    staging.clear()
    if in_place:  # nothing comes from a disk, so that all slices may be there at once
        slices = list(slices)
        staging.reserve(_on_gpu(slices))

    def take(key: str, values: Tensor, reads: int, own: bool) -> None:
        on_host = values.device.type == "cpu" and values.is_contiguous()
        if own and on_host:
            staging.keep(key, values)
        elif in_place and on_host:
            staging.hold(key, values, reads)
        else:
            staging.copy(key, values)

    for held in slices:  # one at a time: what is offloaded to disk is there only meanwhile
        part = held.without_padding()
        if not part.values.numel():  # nothing but padding
            continue
        whole = part.values.numel() == math.prod(part.shape)
        twice = main and whole and part.name.startswith("trunk.")  # for trunk/ too
        own = part is not held  # cut out of the padding, so a copy already
        take(f"weight/{part.name}", part.values, 2 if twice else 1, own)
        take(f"momentum/{part.name}", part.momentum, 1, own)
        placement[part.name] = {"shape": list(part.shape), "offset": part.offset}
    if main:
        for name, buffer in buffers_without_padding(model):
            staging.copy(f"weight/{name}", buffer.reshape(-1))
            placement[name] = {"shape": list(buffer.shape), "offset": 0}
    for name, tensor in local_state.items():
        staging.copy(f"local/{name}", tensor)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    staging.free(keep=staging.kinds())  # e.g. of a queue that is no longer there
    return placement


def _on_gpu(slices: Iterable[Slice]) -> dict[str, Tensor]:
    """Tensors that `stage` copies from a GPU as they are, by key."""
    found: dict[str, Tensor] = {}
    for held in slices:
        if held.padding is None:
            found |= {f"weight/{held.name}": held.values, f"momentum/{held.name}": held.momentum}
    return {key: tensor for key, tensor in found.items() if tensor.is_cuda}
