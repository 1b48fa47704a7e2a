"""Counts the bytes of tensors as their storages come and go, real and fake ones alike."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the context: the tensors that operations make, each storage once, until it is freed.

    What existed before is not counted, nor what a kernel takes for itself (a convolution's
    workspace) or C++ makes without an operation (the buckets of DDP).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self._events: list[tuple[int, int]] = []  # number of a storage, bytes gained or lost
        # storage -> its number; -1: from before
        self._numbers: MutableMapping[UntypedStorage, int] = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operation and looks at what it returns."""
        for storage in _storages((args, kwargs)):
            self._numbers.setdefault(storage, -1)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._numbers:
                self._count(storage)
        return result

    def peak(self, without: Iterable[Tensor | None] = ()) -> int:
        """Most bytes that were alive at once, leaving out the storages of some tensors."""
        left_out = {self._numbers.get(storage) for storage in _storages(list(without))}
        now = most = 0
        for number, change in self._events:
            if number not in left_out:
                now += change
                most = max(most, now)
        return most

    def _count(self, storage: UntypedStorage) -> None:
        number, size = len(self._events), storage.nbytes()
        self._numbers[storage] = number
        self._events.append((number, size))
        self.now += size
        weakref.finalize(storage, self._discount, number, size).atexit = False

    def _discount(self, number: int, size: int) -> None:
        self._events.append((number, -size))
        self.now -= size


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
