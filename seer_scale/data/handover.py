"""Hands micro-batches from one process to another without copies, in memory of the kernel.

The crops of a micro-batch lie in a file without a name (`memfd_create`), whose descriptor travels
through the pipe. Unlike torch's sharing, this needs no room in /dev/shm, of which a container has
64 MB, and a failure is an exception of the sender, which travels through the pipe too.
"""

from __future__ import annotations

import math
import mmap
import os
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seer_scale.data.batches import BadSample, MicroBatch
from seer_scale.errors import DataError


class _Announced(NamedTuple):
    """A micro-batch whose crops follow; arrays, because torch would share tensors its own way."""

    shapes: list[tuple[int, ...]]
    parameters: list[NDArray[np.float32]] | None
    sample_ids: NDArray[np.int64]
    bad: list[BadSample]


def send(pipe: Connection, item: Any) -> None:
    """Sends a micro-batch, or any other small object that can be pickled.

    Raises:
        DataError: the system gives no memory or no descriptor; nothing has been sent.
        OSError: the receiver is gone.
    """
    if not isinstance(item, MicroBatch):
        pipe.send(item)
        return
    about = _Announced(
        [tuple(crop.shape) for crop in item.crops],
        None if item.parameters is None else [rows.numpy() for rows in item.parameters],
        item.sample_ids.numpy(),
        item.bad,
    )
    shared = _share(item.crops)
    try:
        pipe.send(about)
        reduction.send_handle(pipe, shared, None)
    finally:
        os.close(shared)


def receive(pipe: Connection) -> Any:
    """Receives what `send` has sent; the crops of a micro-batch keep their memory while in use.

    Raises:
        DataError: the system gives no descriptor or address space for a micro-batch.
        EOFError, OSError: the sender is gone.
    """
    about = pipe.recv()
    if not isinstance(about, _Announced):
        return about
    sizes = [math.prod(shape) for shape in about.shapes]
    try:
        shared = reduction.recv_handle(pipe)
        try:
            # All pages at once: otherwise the first look at each is an interruption.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            area = mmap.mmap(shared, sum(sizes), flags)
        finally:
            os.close(shared)
    except (OSError, RuntimeError) as error:  # RuntimeError: no descriptor is free
        raise _refused(sum(sizes), error) from error
    crops, offset = list[Tensor](), 0
    for shape, size in zip(about.shapes, sizes, strict=True):
        flat = torch.frombuffer(area, dtype=torch.uint8, count=size, offset=offset)
        crops.append(flat.view(shape))
        offset += size
    parameters = None
    if about.parameters is not None:
        parameters = [torch.from_numpy(rows) for rows in about.parameters]
    return MicroBatch(crops, parameters, torch.from_numpy(about.sample_ids), about.bad)


def _share(crops: list[Tensor]) -> int:
    """Copies crops one after the other into a new memory file; returns its descriptor."""
    shared = -1
    try:
        shared = os.memfd_create("seer-scale micro-batch")
        with open(shared, "wb", closefd=False) as file:
            for crop in crops:
                file.write(crop.numpy().data)
    except OSError as error:
        if shared >= 0:
            os.close(shared)
        raise _refused(sum(crop.numel() for crop in crops), error) from error
    return shared


def _refused(size: int, error: Exception) -> DataError:
    why = getattr(error, "strerror", None) or str(error)
    return DataError(
        f"a micro-batch of {size / 2**20:.1f} MiB cannot be handed to the trainer ({why}): "
        "give the machine or container more memory and open files (ulimit -n), lower "
        "data.prefetch or train.micro_batch_size, or set data.workers=0"
    )
