"""The stream of one rank's micro-batches: made by a process of its own, or where it is read.

The number of workers decides only when a micro-batch is ready, never its content.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Literal, Self

import torch

from seer_scale.data.augment import MultiCrop
from seer_scale.data.batches import BatchMaker, MicroBatch
from seer_scale.data.order import Order, rank_positions
from seer_scale.data.pipeline import Pipeline, Stalled
from seer_scale.data.sources import Source
from seer_scale.data.tars import TarShards
from seer_scale.data.worker import Worker


class MicroBatchLoader(Iterator[MicroBatch]):
    """Endless iterator over a pipeline's micro-batches; use it as a context manager, or close it.

    If there are GPUs, micro-batches come in pinned memory, one of them prepared by a thread.

    Args:
        pipeline: makes the micro-batches.
        ahead: micro-batches that a process of its own has ready; 0 runs the pipeline where the
            micro-batches are asked for.

    Attributes:
        worker: the process of the pipeline, if it has one.
    """

    def __init__(self, pipeline: Pipeline, ahead: int) -> None:
        self.worker = Worker(pipeline, ahead) if ahead else None
        self._items: Iterator[MicroBatch | Stalled] | None = self.worker or iter(pipeline)
        self._pinner = ThreadPoolExecutor(1) if torch.cuda.is_available() else None
        self._pinned: Future[MicroBatch] | None = None

    def __next__(self) -> MicroBatch:
        """Returns the next micro-batch; an image that takes long is named on standard error.

        Raises:
            DataError: too many images cannot be used, or the process of the pipeline is lost.
        """
        if self._items is None:
            raise StopIteration
        if self._pinner is None:
            return self._take(self._items)
        batch = (self._pinned or self._pinner.submit(self._take_pinned, self._items)).result()
        self._pinned = self._pinner.submit(self._take_pinned, self._items)
        return batch

    def _take(self, items: Iterator[MicroBatch | Stalled]) -> MicroBatch:
        while isinstance(item := next(items), Stalled):
            rank = os.environ.get("RANK", "0")
            print(
                f"warning: rank {rank} has been reading {item.name} for {item.seconds:.0f} s: does "
                "its disk or server still answer? The run waits, at most run.hang_minutes",
                file=sys.stderr,
                flush=True,
            )
        return item

    def _take_pinned(self, items: Iterator[MicroBatch | Stalled]) -> MicroBatch:
        batch = self._take(items)
        return batch._replace(
            crops=[crop.pin_memory() for crop in batch.crops],
            parameters=batch.parameters and [rows.pin_memory() for rows in batch.parameters],
        )

    def close(self) -> None:
        """Ends the process; the iterator is then exhausted."""
        self._items = None
        if self.worker is not None:
            self.worker.close()
        if self._pinner is not None:
            self._pinner.shutdown(wait=False, cancel_futures=True)

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
    """Builds the loader of `rank`'s micro-batches, from position `first_sample` on.

    Args:
        source: the collection of images.
        transform: draws the parameters of the crops.
        seed: seed of sample order and augmentation.
        micro_batch_size: images per micro-batch and rank.
        gradient_accumulation: micro-batches per step.
        rank: number of this rank.
        world_size: number of ranks that share each step.
        first_sample: number of samples that all ranks together have seen before.
        origin: number of samples seen before this collection came into use.
        window: number of shards whose images are mixed with each other.
        augment_on: where crops are distorted; see `MicroBatch`.
        workers: threads of the worker process; 0 works in the caller's thread instead.
        prefetch: micro-batches prepared in advance.
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
    pipeline = Pipeline(
        maker,
        positions,
        threads=workers,
        ahead=prefetch if workers else 0,
        fetchers=source.fetchers if isinstance(source, TarShards) and workers else 0,
    )
    return MicroBatchLoader(pipeline, max(1, prefetch) if workers else 0)


def most_micro_batches(prefetch: int) -> int:
    """Counts the micro-batches that one rank's loader has in memory at most.

    As many as are prepared ahead wait for the trainer, as many more and one are made, and two are
    in the hands of the loader's threads and of the trainer.
    """
    return 2 * prefetch + 3


def loader_bytes(transform: MultiCrop, micro_batch_size: int, prefetch: int) -> int:
    """Computes the memory in bytes that the micro-batches of one rank's loader take at most."""
    crops = sum(c * size**2 for size, c in zip(transform.sizes, transform.counts, strict=True))
    return most_micro_batches(prefetch) * micro_batch_size * crops * 3
