"""End of all ranks after one rank has failed, with the traceback of that rank only.

The first rank to fail leaves a mark in the store of the rendezvous. The other ranks see the mark
within a second and end, even while they wait in a collective that will never complete.
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
GRACE_SECONDS = 10.0  # time for a rank to report an error of its own before the rank is ended
_over = threading.Event()


def watch() -> None:
    """Starts the thread that ends this process once another rank has failed."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        _over.clear()
        threading.Thread(target=_watch, name="failure-watch", daemon=True).start()


def unwatch() -> None:
    """Stops watching; call this when every rank has done its work."""
    _over.set()


def end(error: BaseException) -> NoReturn:
    """Ends this process with the traceback of `error`, unless another rank failed before.

    After another rank has gone, an error here (a closed connection) would only hide the cause.
    """
    if (first := mark()) is None:
        traceback.print_exception(error, file=sys.stderr)
    else:
        print(f"[rank {dist.get_rank()}] ended, because {first} failed", file=sys.stderr)
    _leave()


def mark() -> str | None:
    """Marks this rank as the first to fail; returns None, or the rank that failed before."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    me = f"rank {dist.get_rank()}"
    try:
        first = _store().compare_set(MARK, "", me).decode()
    except Exception:  # the process that hosts the store is gone
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
    # Not sys.exit, which would wait for threads of a process group that other ranks still use.
    os._exit(1)
