"""The endless stream of micro-batches of one rank, made by threads of a process of its own.

Threads share what they read and need no copy between them, since decoding and resizing let go of
Python's lock. They are not the trainer's threads, because whatever holds that lock there holds up
the launch of kernels. Workers only change when a micro-batch is ready, never what is in it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, Self

import cv2
import torch
from torch.utils.data import DataLoader, IterableDataset

from seer_scale.data.augment import MultiCrop
from seer_scale.data.batches import BatchMaker, MicroBatch, Sample
from seer_scale.data.order import Order, rank_positions
from seer_scale.data.sources import Source
from seer_scale.errors import DataError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Pipeline(IterableDataset[MicroBatch | DataError]):
    """Micro-batches in their order, the samples of the next few under way meanwhile."""

    def __init__(
        self,
        maker: BatchMaker,
        positions: Callable[[], Iterator[range]],
        threads: int,
        prefetch: int,
    ) -> None:
        self._maker, self._positions = maker, positions
        self._threads, self._prefetch = threads, prefetch

    def __iter__(self) -> Iterator[MicroBatch | DataError]:
        pool = ThreadPoolExecutor(max(1, self._threads))
        positions = self._positions()
        under_way: deque[list[Future[Sample]]] = deque()
        try:
            while True:
                while len(under_way) <= self._prefetch:
                    under_way.append(self._maker.start(next(positions), pool))
                samples = [sample.result() for sample in under_way.popleft()]
                yield self._maker.join(samples)
        except DataError as error:
            # Raised here, it would reach the user wrapped in the traceback of a worker.
            yield error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class MicroBatchLoader(Iterator[MicroBatch]):
    """An iterator without end that owns its worker process; use it as a context or close it."""

    def __init__(self, batches: DataLoader[MicroBatch | DataError]) -> None:
        # Started while stop signals are blocked, all children inherit the block: Ctrl-C and the
        # launcher's SIGTERM are the trainer's to handle, which still needs its next batches.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self._iterator: Iterator[MicroBatch | DataError] | None = iter(batches)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __next__(self) -> MicroBatch:
        if self._iterator is None:
            raise StopIteration
        item = next(self._iterator)
        if isinstance(item, DataError):
            raise item
        return item

    def close(self) -> None:
        """Ends the worker; no batches come afterwards."""
        workers = getattr(self._iterator, "_workers", [])
        self._iterator = None  # asks them to end, and waits some seconds
        for worker in workers:
            if worker.is_alive():  # in the middle of a read that is tried again and again
                worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_loader(
    source: Source,
    transform: MultiCrop,
    *,
    seed: int,
    micro_batch_size: int,
    gradient_accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    first_sample: int = 0,
    origin: int = 0,
    window: int = 16,
    augment_on: Literal["host", "device"] = "host",
    workers: int,
    prefetch: int = 4,
) -> MicroBatchLoader:
    """Micro-batches of `rank` from the sample at position `first_sample` on.

    Args:
        source: where the images come from.
        transform: draws the crops of an image.
        seed: of sample order and augmentation.
        micro_batch_size: images per micro-batch and rank.
        gradient_accumulation: micro-batches per step.
        rank: this rank.
        world_size: ranks that share each step.
        first_sample: samples that all ranks together have seen before.
        origin: how many of them came before this collection was in use.
        window: shards whose images are mixed with each other.
        augment_on: who distorts the crops; see `MicroBatch`.
        workers: threads that read and cut, in one process; 0 does it in the caller's thread.
        prefetch: micro-batches that are made ahead.
    """
    order = Order(source.shard_sizes, seed=seed, version=source.version, window=window)
    maker = BatchMaker(source, order, transform, seed=seed, origin=origin, augment_on=augment_on)
    positions = partial(
        rank_positions,
        first_sample,
        micro_batch_size=micro_batch_size,
        gradient_accumulation=gradient_accumulation,
        rank=rank,
        world_size=world_size,
    )
    options: dict[str, Any] = {}
    if workers:
        options = {
            "num_workers": 1,
            "prefetch_factor": max(1, prefetch),
            "multiprocessing_context": _worker_context(),
            "worker_init_fn": _init_worker,
        }
    return MicroBatchLoader(
        DataLoader(
            _Pipeline(maker, positions, workers, prefetch if workers else 0),
            batch_size=None,  # an item is a whole micro-batch already
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw from the trainer's own
            **options,
        )
    )


def _unchanged(item: Any) -> Any:
    return item


def _worker_context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a clean server process.

    Forking the trainer itself would copy the locks of its communication threads in whatever state
    they are; spawning would import torch anew for every rank instead of once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _init_worker(_: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    cv2.setNumThreads(1)  # the pipeline's own threads are as many as are asked for
    # Batches are prefetched; a trainer that wakes for a collective must not queue behind them.
    os.nice(19)
    # torch's own watch looks at the parent process, which here is the server, not the trainer.
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)
