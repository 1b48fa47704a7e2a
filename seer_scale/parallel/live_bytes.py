"""Counter of the bytes of tensors, real or fake, while their storages are made and freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, inside the context, the storages that operations make, each once, until it is freed.

    Not counted: tensors that existed before, the workspace of a kernel (of a convolution, say), and
    tensors that C++ makes without an operation (the buckets of DDP).

    Attributes:
        now: bytes that are alive.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self._events: list[tuple[int, int]] = []  # number of a storage, bytes gained or lost
        # storage -> its number, or -1 if the storage existed before
        self._numbers: MutableMapping[UntypedStorage, int] = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operation and counts the new storages in its result."""
        for storage in _storages((args, kwargs)):
            self._numbers.setdefault(storage, -1)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._numbers:
                self._count(storage)
        return result

    def peak(self, without: Iterable[Tensor | None] = ()) -> int:
        """Returns the largest number of bytes alive at once, not counting the tensors `without`."""
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
