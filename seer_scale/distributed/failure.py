"""A rank that fails takes the others down: its own traceback first, and nobody waits for hours.

The first to fail leaves a mark in the store that all ranks met at. The others see it within a
second, also while they wait in a collective that will never end, and leave.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from typing import Any, NoReturn

import torch.distributed as dist

MARK = "seer_scale/failed"
POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0  # for a rank whose own error is on its way, before it is ended where it stands
_over = threading.Event()


def watch() -> None:
    """Starts the thread that ends this process once another rank has failed."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        _over.clear()
        threading.Thread(target=_watch, name="failure-watch", daemon=True).start()


def unwatch() -> None:
    """Ends the watch, once every rank has done its work and may leave when it likes."""
    _over.set()


def end(error: BaseException) -> NoReturn:
    """Ends this process with the traceback of `error`, unless another rank failed before it.

    What a rank sees after another one is gone (a closed connection) would only hide the cause.
    """
    if (first := mark()) is None:
        traceback.print_exception(error, file=sys.stderr)
    else:
        print(f"[rank {dist.get_rank()}] ended, because {first} failed", file=sys.stderr)
    _leave()


def mark() -> str | None:
    """Marks this rank as the first to fail, or returns which one was."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    me = f"rank {dist.get_rank()}"
    try:
        first = _store().compare_set(MARK, "", me).decode()
    except Exception:  # the rank that kept the store is gone
        return "the rank that kept the store"
    return None if first == me else first


def _watch() -> None:
    store = _store()
    while not _over.wait(POLL_SECONDS):
        try:
            if not store.check([MARK]):
                continue
            first = store.get(MARK).decode()
        except Exception:
            first = "the rank that kept the store"
        if first == f"rank {dist.get_rank()}":
            return
        if _over.wait(GRACE_SECONDS):
            return
        print(f"[rank {dist.get_rank()}] ended, because {first} failed", file=sys.stderr)
        _leave()


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _leave() -> NoReturn:
    sys.stderr.flush()
    sys.stdout.flush()
    # Not sys.exit: threads of a process group that other ranks still wait in would hold it up.
    os._exit(1)
