"""Ends a run that hangs in a collective, and names the ranks that did not come to it.

Every rank's main thread says where it is, a thread of its own puts that into the store through
which the ranks found each other, every second. A rank whose main thread stands still for too long
reads what the others say: who is a step or a phase behind, or has said nothing for a while, is
missing. The store answers without any collective.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from seer_scale.errors import LOST_RANK_STATUS

BEAT_S = 1.0
LISTENING_BEATS = 8  # without a new message in that time a rank is gone, or its node stands still
STORE_S = 15.0  # that the store may take to answer


class Place(NamedTuple):
    """Where a rank is. `beat` counts its messages: clocks would have to agree between nodes."""

    step: int
    phase: int
    doing: str
    host: str
    beat: int


class Watchdog:
    """Watches this rank's progress, and the others' once it stops.

    Args:
        timeout_s: that a step may take.
        end: leaves the process; a test puts something else here.
    """

    def __init__(
        self, timeout_s: float, end: Callable[[str], None] | None = None, beat_s: float = BEAT_S
    ) -> None:
        self._timeout, self._end, self._beat = timeout_s, end or _leave, beat_s
        self._at = (0, 0, "starting")
        self._since = time.monotonic()
        self._beats = 0
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._world = dist.get_rank(), dist.get_world_size()
            # By a connection of its own: torch's may be held by a collective that waits.
            self._store = dist.distributed_c10d.PrefixStore("watchdog", _default_store())
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def at(self, step: int, phase: int, doing: str) -> None:
        """Says that this rank has got to a phase of a step; costs next to nothing."""
        self._at, self._since = (step, phase, doing), time.monotonic()

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(5 * self._beat)

    # ----------------------------------------------------------------------------- in the thread

    def _watch(self) -> None:
        while not self._closed.is_set():
            late = time.monotonic() - self._since - self._timeout
            missing: list[str] = []
            try:
                self._tell()
                if late > 0:
                    missing = self._find_missing()
            except Exception as error:  # whatever it is, there is no store to ask any more
                missing = [f"all others (the store of rank 0's node does not answer: {error})"]
            if late > 0 and not self._closed.is_set():  # a run that goes on needs no store
                self._end(self._sentence(missing))
                return
            self._closed.wait(self._beat)

    def _tell(self) -> None:
        self._beats += 1
        place = Place(*self._at, socket.gethostname(), self._beats)
        self._store.set(str(self._rank), json.dumps(place))

    def _places(self) -> dict[int, Place]:
        found = {}
        for rank in range(self._world):
            if self._store.check([str(rank)]):
                found[rank] = Place(*json.loads(self._store.get(str(rank))))
        return found

    def _find_missing(self) -> list[str]:
        """The ranks that keep the others waiting, each with what it said last."""
        first = self._places()
        for _ in range(LISTENING_BEATS):  # the others listen too, and have to hear this one
            time.sleep(self._beat)
            self._tell()
        last = self._places()
        furthest = max((place.step, place.phase) for place in last.values())
        missing = []
        for rank in range(self._world):
            place = last.get(rank)
            if place is None:
                missing.append(f"rank {rank} (never began)")
                continue
            where = f"step {place.step}, {place.doing}"
            if rank in first and first[rank].beat == place.beat:
                missing.append(f"rank {rank} on {place.host} (silent since {where})")
            elif (place.step, place.phase) < furthest:
                missing.append(f"rank {rank} on {place.host} (still in {where})")
        return missing

    def _sentence(self, missing: list[str]) -> str:
        step, _, doing = self._at
        who = "; ".join(missing) if missing else "none that the others could tell"
        return (
            f"rank {self._rank} has waited {time.monotonic() - self._since:.0f} s in step {step}, "
            f"{doing}; missing: {who}; this rank is at {_line_of(self._main)}"
        )


def _default_store() -> Any:
    store = dist.distributed_c10d._get_default_store()
    try:
        store = store.clone()
    except (AttributeError, RuntimeError):  # a store without connections
        return store
    store.set_timeout(timedelta(seconds=STORE_S))
    return store


def _line_of(thread: int) -> str:
    """The innermost line of a thread that is this project's, or else whatever it is."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "no line"
    stack = traceback.extract_stack(frame)
    own = [line for line in stack if "seer_scale" in line.filename]
    line = (own or stack)[-1]
    return f"{os.path.basename(line.filename)}:{line.lineno} {line.name}"


def _leave(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(LOST_RANK_STATUS)
