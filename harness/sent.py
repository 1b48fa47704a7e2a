"""The bytes of the collectives that this process takes part in."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operator -> its name here, and the argument that is whole: what is gathered, or reduced.
_WHOLE = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
}


class Sent(TorchDispatchMode):
    """Counts collectives inside the context.

    Attributes:
        tensors: for each collective by name, the whole tensors' types and bytes, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, list[tuple[torch.dtype, int]]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Notes a collective, and runs the operation."""
        name = func.name()
        if name.startswith("c10d::") and name[6:] in _WHOLE:
            kind, place = _WHOLE[name[6:]]
            whole = args[place]
            for tensor in whole if isinstance(whole, list) else [whole]:
                self.tensors[kind].append((tensor.dtype, tensor.nbytes))
        return func(*args, **(kwargs or {}))

    def bytes_of(self, kind: str) -> int:
        """Bytes of all whole tensors of a kind of collective."""
        return sum(size for _, size in self.tensors[kind])
