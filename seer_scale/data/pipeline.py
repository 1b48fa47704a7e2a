"""The endless stream of micro-batches of one rank, made by threads a few micro-batches ahead.

Decoding and resizing release the GIL, so threads run in parallel and share their data without
copies.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from seer_scale.data.batches import BatchMaker, MicroBatch, Sample

PATIENCE_S = 60.0  # seconds that an image may take before it is named


class Stalled(NamedTuple):
    """An image that has been read for so long that the user should know its name.

    Attributes:
        name: name of the image.
        seconds: time since the reading began.
    """

    name: str
    seconds: float


class Pipeline:
    """Yields micro-batches in order, while threads already make the samples of the next ones.

    Args:
        maker: makes the samples and joins them.
        positions: opens the endless stream of this rank's positions, one range per micro-batch.
        threads: number of threads.
        ahead: micro-batches begun before they are asked for.
        fetchers: number of threads that read images ahead of those that decode them.
        patience_s: seconds after which an image that is still read is yielded as `Stalled`; the
            next one is yielded after twice that time, and so on.
    """

    def __init__(
        self,
        maker: BatchMaker,
        positions: Callable[[], Iterator[range]],
        *,
        threads: int,
        ahead: int,
        fetchers: int = 0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._maker, self._positions = maker, positions
        self._threads, self._ahead, self._patience = threads, ahead, patience_s
        self._fetchers = fetchers

    def __iter__(self) -> Iterator[MicroBatch | Stalled]:
        pool = ThreadPoolExecutor(max(1, self._threads))
        fetchers = ThreadPoolExecutor(self._fetchers) if self._fetchers else None
        positions = self._positions()
        under_way: deque[list[Future[Sample]]] = deque()
        try:
            while True:
                while len(under_way) <= self._ahead:
                    under_way.append(self._maker.start(next(positions), pool, fetchers))
                yield from self._stalls(under_way[0])
                yield self._maker.join([sample.result() for sample in under_way.popleft()])
        finally:
            for threads in filter(None, (pool, fetchers)):
                threads.shutdown(wait=False, cancel_futures=True)

    def _stalls(self, samples: list[Future[Sample]]) -> Iterator[Stalled]:
        """Waits until all samples are made; yields the slowest image whenever that takes long."""
        patience = self._patience
        while wait(samples, patience).not_done:
            if reading := self._maker.reading():
                index, since = reading
                yield Stalled(self._maker.name(index), time.monotonic() - since)
            patience *= 2
