"""Watchdog that ends a run that stands still, and names the ranks that are missing.

The main thread of every rank reports its place in the step. A second thread writes that place into
the store of the rendezvous, every second. A rank whose main thread does not move for too long reads
the places of the others. A rank that is a step or a phase behind, or has written nothing for a
while, is missing. The store answers without any collective. A run of one rank is watched too: its
loader, save or evaluation may wait for a disk that never answers.

A rank that stands still for much longer than it did before, in the same phase, is a warning at
first: a shared disk may be away for minutes and come back. Where every rank says that it has stood
for too long in a phase that waits for other ranks only, nothing can come back, and the run ends. A
silent rank says nothing: its node or network may come back.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from seer_scale.distributed import flight_recorder
from seer_scale.errors import LOST_RANK_STATUS

BEAT_S = 1.0
LISTENING_BEATS = 8  # beats without a new message after which a rank counts as silent
LEAVING_BEATS = 16  # that a looking rank stays: the store may go with it, and all have to look
STORE_S = 15.0  # seconds that the store may take to answer
# A phase is unusually long after so many times the median of the last ones and a margin. Before it
# has been seen so often nothing is usual: first steps compile, and first saves make folders.
UNUSUAL, MARGIN_S, SEEN = 20, 60.0, 5
PATIENCE = 5  # times the margin until a phase that waits for ranks only is stuck
LOOKING = range(2)  # ranks that look at all others before the limit; the others look at them
ASLEEP = 10  # times the beat; who sleeps longer was stopped, as by Ctrl-Z, and did not wait


class Place(NamedTuple):
    """Place of a rank in the training.

    Attributes:
        step: number of the step.
        phase: number of the phase within the step.
        doing: the phase in words.
        host: name of the rank's node.
        beat: number of the message, in place of a time: the clocks of nodes may differ.
        collective: what `flight_recorder.present` says; '' before the rank stands still.
        stuck: whether it has stood for too long in a phase that waits for ranks only.
        hung: whether it has seen that every rank is stuck.
    """

    step: int
    phase: int
    doing: str
    host: str
    beat: int
    collective: str = ""
    stuck: bool = False
    hung: bool = False


class Watchdog:
    """Watches this rank's progress; once it stops, compares the places of all ranks and ends.

    Args:
        timeout_s: seconds that a phase of a step may take.
        end: ends the process with a sentence; a test passes another function.
        beat_s: seconds between two messages.
        records: folder for the last collectives of every rank; None for none.
        warn: tells the user something.
        margin_s: seconds more than usual that are nothing to speak of.
        ranks_only: phases that wait for other ranks and for devices, never for a disk or a server.
    """

    def __init__(
        self,
        timeout_s: float,
        end: Callable[[str], None] | None = None,
        beat_s: float = BEAT_S,
        *,
        records: Path | None = None,
        warn: Callable[[str], None] | None = None,
        margin_s: float = MARGIN_S,
        ranks_only: frozenset[str] = frozenset(),
    ) -> None:
        self._timeout, self._end, self._beat = timeout_s, end or _leave, beat_s
        self._records, self._warn, self._margin = records, warn or _warn, margin_s
        self._ranks_only, self._stuck, self._hung = ranks_only, False, False
        self._at = (0, 0, "starting")
        self._since = time.monotonic()
        self._last: dict[int, Place] = {}  # what `_find_missing` found
        self._warned = 0.0  # the beginning of the phase that the last warning was about
        self._durations: defaultdict[str, deque[float]] = defaultdict(partial(deque, maxlen=50))
        self._beats = 0
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._rank, self._world = 0, 1
        self._store: Any = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._world = dist.get_rank(), dist.get_world_size()
            # A connection of its own, because a waiting collective may hold torch's.
            self._store = dist.distributed_c10d.PrefixStore("watchdog", _default_store())
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, step: int, phase: int, doing: str) -> None:
        """Reports the place of this rank; costs almost nothing.

        Args:
            step: number of the step.
            phase: number of the phase within the step.
            doing: the phase in words.
        """
        now = time.monotonic()
        self._durations[self._at[2]].append(now - self._since)
        self._at, self._since = (step, phase, doing), now

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._thread.join(5 * self._beat)

    # ----------------------------------------------------------------------------- in the thread

    def _watch(self) -> None:
        while not self._closed.is_set():
            since, doing, missing = self._since, self._at[2], list[str]()
            stands = time.monotonic() - since
            late = stands > self._timeout
            slow = stands > self._usual(doing) and since != self._warned
            stuck = doing in self._ranks_only and stands > self._usual(doing, PATIENCE)
            self._stuck = stuck
            try:
                if self._store is not None:
                    self._tell()
                    # Not every rank looks, since each asks for the places of all.
                    if late or ((slow or stuck) and self._rank in LOOKING):
                        missing = self._find_missing()
                if stuck and not late and self._nothing_comes_back():
                    if self._store is not None:
                        missing = self._find_missing(LEAVING_BEATS if self._rank in LOOKING else 0)
                    late = since == self._since
            except Exception as error:  # any error means that the store cannot be asked any more
                missing = [f"all others (the store of rank 0's node does not answer: {error})"]
                late = late or stuck  # rank 0 may have seen that all are, and left
            if late and not self._closed.is_set():  # a run that moves on needs no store
                took = f"; this phase usually takes {self._median(doing):.2g} s" if stuck else ""
                self._end(self._sentence(missing) + took + self._record())
                return
            if slow and since == self._since:
                self._warned = since
                if self._rank == 0 or any(each.startswith("rank 0 ") for each in missing):
                    self._warn(
                        f"{self._sentence(missing)}; this phase usually takes "
                        f"{self._median(doing):.2g} s; the run waits, at most "
                        f"{self._timeout:.0f} s (run.hang_minutes), or less if all ranks are stuck"
                    )
            before = time.monotonic()
            self._closed.wait(self._beat)
            slept = time.monotonic() - before
            if slept > ASLEEP * self._beat:
                self._since += slept

    def _usual(self, doing: str, margins: int = 1) -> float:
        """Seconds after which a phase takes unusually long; infinity if it is not yet known."""
        if len(self._durations[doing]) < SEEN:
            return float("inf")
        return UNUSUAL * self._median(doing) + margins * self._margin

    def _median(self, doing: str) -> float:
        return statistics.median(list(self._durations[doing]))

    def _nothing_comes_back(self) -> bool:
        """Whether all ranks are stuck, by what the looking ranks have seen."""
        if self._store is None:
            return True
        if self._rank in LOOKING:
            self._hung = all(place.stuck for place in self._last.values())
            self._tell()
        return any(place.hung for place in self._places(LOOKING).values())

    def _tell(self) -> None:
        self._beats += 1
        first = min(self._timeout, self._usual(self._at[2]))
        soon = time.monotonic() - self._since > first / 2
        collective = flight_recorder.present() if soon else ""
        place = Place(
            *self._at, socket.gethostname(), self._beats, collective, self._stuck, self._hung
        )
        self._store.set(str(self._rank), json.dumps(place))

    def _places(self, ranks: Iterable[int]) -> dict[int, Place]:
        found = {}
        for rank in ranks:
            if self._store.check([str(rank)]):
                found[rank] = Place(*json.loads(self._store.get(str(rank))))
        return found

    def _find_missing(self, more_beats: int = 0) -> list[str]:
        """Lists the ranks that the others wait for, each with its last place."""
        first = self._places(range(self._world))
        # The others listen too, and need this rank's messages.
        for _ in range(LISTENING_BEATS + more_beats):
            time.sleep(self._beat)
            self._tell()
        last = self._last = self._places(range(self._world))
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
        others = f"; missing: {who}{self._collectives()}" if self._world > 1 else ""
        return (
            f"rank {self._rank} has waited {time.monotonic() - self._since:.0f} s in step {step}, "
            f"{doing}{others}; this rank is at {_line_of(self._main)}"
        )

    def _collectives(self) -> str:
        """Says which ranks are in which collective, as far as ranks have said so."""
        said = {rank: place.collective for rank, place in self._last.items() if place.collective}
        groups = [
            f"{_ranks(rank for rank in said if said[rank] == each)} {each}"
            for each in dict.fromkeys(said.values())
        ]
        return f"; collectives: {'; '.join(groups)}" if groups else ""

    def _record(self) -> str:
        """Writes this rank's record of collectives; says where, or why not."""
        if self._records is None or self._store is None:
            return ""
        if problem := flight_recorder.write(self._records, self._rank):
            return f"; the record of its collectives is not written to {self._records} ({problem})"
        return f"; its last collectives are in {self._records}"


def _ranks(ranks: Iterable[int]) -> str:
    """Names ranks in ascending order, runs of them by both ends: ranks 0, 2-5."""
    runs = [
        [rank for _, rank in run]
        for _, run in groupby(enumerate(sorted(ranks)), lambda pair: pair[1] - pair[0])
    ]
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    alone = len(runs) == 1 and len(runs[0]) == 1
    return f"rank {parts[0]} is" if alone else f"ranks {', '.join(parts)} are"


def _default_store() -> Any:
    store = dist.distributed_c10d._get_default_store()
    try:
        store = store.clone()
    except (AttributeError, RuntimeError):  # a store without connections
        return store
    store.set_timeout(timedelta(seconds=STORE_S))
    return store


def _line_of(thread: int) -> str:
    """Innermost line of a thread inside this project, or else the innermost line of all."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "no line"
    stack = traceback.extract_stack(frame)
    own = [line for line in stack if "seer_scale" in line.filename]
    line = (own or stack)[-1]
    return f"{os.path.basename(line.filename)}:{line.lineno} {line.name}"


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


def _leave(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(LOST_RANK_STATUS)
