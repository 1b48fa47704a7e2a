"""The endless stream of micro-batches of one rank.

Everything in a micro-batch follows from (seed, position): workers only change when it is ready.
Broken images are replaced by the next good one, so that batches stay full, and reported.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seer_scale.data.decode import BadImage, decode
from seer_scale.data.order import rank_positions, sample_at, sample_rng
from seer_scale.data.sources import Source
from seer_scale.errors import DataError

MAX_REPLACEMENTS = 100

Transform = Callable[[Image.Image, np.random.Generator], list[Tensor]]

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class BadSample(NamedTuple):
    """An image that could not be used, and why."""

    name: str
    cause: str


class MicroBatch(NamedTuple):
    """What one rank feeds through the model at once.

    Attributes:
        crops: one tensor `[count * B, 3, size, size]` per resolution, crop-major: crop 0 of all
            samples, then crop 1 of all samples.
        sample_ids: `[B]` int64, the numbers of the images that were really read.
        bad: the images that were replaced.
    """

    crops: list[Tensor]
    sample_ids: Tensor
    bad: list[BadSample]


class _MicroBatches(Dataset[MicroBatch | DataError]):
    """Micro-batches by their positions."""

    def __init__(self, source: Source, transform: Transform, seed: int) -> None:
        self._source, self._transform, self._seed = source, transform, seed

    def __getitem__(self, positions: Sequence[int]) -> MicroBatch | DataError:
        try:
            return self._read(positions)
        except DataError as error:
            # Raised here, it would reach the user wrapped in the traceback of a worker.
            return error

    def _read(self, positions: Sequence[int]) -> MicroBatch:
        samples: list[list[Tensor]] = []
        ids: list[int] = []
        bad: list[BadSample] = []
        for position in positions:
            epoch, index = sample_at(position, size=len(self._source), seed=self._seed)
            image, used = read_image(self._source, index, bad)
            samples.append(self._transform(image, sample_rng(self._seed, epoch, index)))
            ids.append(used)
        by_resolution = zip(*samples, strict=True)
        crops = [torch.stack(parts, dim=1).flatten(0, 1) for parts in by_resolution]
        return MicroBatch(crops, torch.tensor(ids), bad)


def read_image(source: Source, index: int, bad: list[BadSample]) -> tuple[Image.Image, int]:
    """Image `index` or the next good one after it, with its number; adds bad ones to `bad`.

    Raises:
        DataError: none of the next `MAX_REPLACEMENTS` images can be used.
    """
    attempts = min(MAX_REPLACEMENTS, len(source))
    for candidate in ((index + attempt) % len(source) for attempt in range(attempts)):
        try:
            return decode(source.read(candidate)), candidate
        except BadImage as error:
            cause = error.cause
        except OSError as error:
            cause = f"unreadable: {error.strerror}"
        bad.append(BadSample(source.name(candidate), cause))
    raise DataError(
        f"{attempts} images in a row cannot be used, the last one is {bad[-1].name}"
        f" ({bad[-1].cause}): check data.path"
    )


class MicroBatchLoader(Iterator[MicroBatch]):
    """An iterator without end that owns its worker processes; use it as a context or close it."""

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
        """Ends the workers; no batches come afterwards."""
        self._iterator = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_loader(
    source: Source,
    transform: Transform,
    *,
    seed: int,
    micro_batch_size: int,
    gradient_accumulation: int,
    rank: int,
    world_size: int,
    first_sample: int,
    workers: int,
) -> MicroBatchLoader:
    """Micro-batches of `rank` from the sample at position `first_sample` on.

    Args:
        source: where the images come from.
        transform: crops of one image, drawn from the given generator.
        seed: of sample order and augmentation.
        micro_batch_size: images per micro-batch and rank.
        gradient_accumulation: micro-batches per step.
        rank: this rank.
        world_size: ranks that share each step.
        first_sample: samples that all ranks together have seen before.
        workers: processes that decode and augment; 0 does it in the caller's thread.
    """
    positions = rank_positions(
        first_sample,
        micro_batch_size=micro_batch_size,
        gradient_accumulation=gradient_accumulation,
        rank=rank,
        world_size=world_size,
    )
    options: dict[str, Any] = {}
    if workers:
        options = {
            "num_workers": workers,
            "prefetch_factor": 2,
            "multiprocessing_context": _worker_context(),
            "worker_init_fn": _init_worker,
        }
    return MicroBatchLoader(
        DataLoader(
            _MicroBatches(source, transform, seed),
            batch_size=None,  # an item is a whole micro-batch already
            sampler=positions,
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
    they are; spawning would import torch once per worker instead of once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _init_worker(_: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    # Batches are prefetched; a trainer that wakes for a collective must not queue behind them.
    os.nice(19)
    # torch's own watch looks at the parent process, which here is the server, not the trainer.
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)
