"""Counts of what a process asks of torch: operators, and collectives with their bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Calls(TorchDispatchMode):
    """Counts calls inside the context.

    Attributes:
        aten: calls into ATen, views included.
        collectives: number of collectives by kind.
        bytes: bytes of the largest argument of each collective, summed, by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.aten = 0
        self.collectives: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts one call and makes it."""
        if func.namespace in ("c10d", "_c10d_functional"):
            kind = func.overloadpacket.__name__.strip("_").replace("_base", "")
            self.collectives[kind] += 1
            self.bytes[kind] += max((_bytes(arg) for arg in args), default=0)
        elif func.namespace == "aten":
            self.aten += 1
        return func(*args, **(kwargs or {}))


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
