"""The memory of a GPU at the moment when it runs out: which blocks of which sizes are taken."""

from __future__ import annotations

from pathlib import Path

import torch


class MemorySnapshot:
    """Keeps torch's snapshot of the allocator when an allocation fails, before anything is freed.

    The file is a pickle for https://pytorch.org/memory_viz. Stacks of allocations are not in it:
    to keep them costs time at every allocation.

    Args:
        path: file of this rank; its folder is made when it is needed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._result = ""

    def attach(self) -> None:
        """Asks torch to call `take` when an allocation fails; the process needs a GPU."""
        torch._C._cuda_attach_out_of_memory_observer(self.take)  # type: ignore[attr-defined]

    def take(self, *_: int) -> None:
        """Writes the snapshot; torch gives the device and sizes. A later failure replaces it."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._path))  # type: ignore[no-untyped-call]
            self._result = f"; what the GPU's memory held is in {self._path}"
        except Exception as error:  # the allocation's own error is the one to tell
            reason = getattr(error, "strerror", None) or error
            self._result = f"; what the GPU's memory held is not written to {self._path} ({reason})"

    def sentence(self) -> str:
        """Says where the snapshot is, or why it is not there; '' if nothing has failed."""
        return self._result
