"""How long a rank works by itself: a clock that stands still while it is in a collective.

Ranks wait for each other in every collective, so that a whole step takes all of them the same time
and does not tell who is slow. On a GPU marks are events on its stream, which the host does not wait
for: they are read after the step, when they have long happened.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WorkClock:
    """Marks come in pairs: the rank works from the first of a pair to the second."""

    def __init__(self) -> None:
        self.running = False
        self._device = torch.device("cpu")
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []  # used again by the next step
        self._used = 0

    @contextmanager
    def lap(self, device: torch.device) -> Iterator[None]:
        """Runs the clock; `device` is the one whose time counts."""
        self._device, self.running = device, True
        self.mark()
        try:
            yield
            self.mark()
        finally:
            self.running = False

    def mark(self) -> None:
        """Work ends here, or begins again."""
        if self._device.type != "cuda":
            self._times.append(time.perf_counter())
            return
        if self._used == len(self._events):
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._events.append(event)
        self._events[self._used].record()
        self._used += 1

    def take(self) -> float:
        """Seconds of all laps since the last call, which the device must be through with."""
        times, events = self._times, self._events[: self._used]
        self._times, self._used = [], 0
        laps = zip(events[::2], events[1::2], strict=False)
        on_device = float(sum(begin.elapsed_time(end) for begin, end in laps)) / 1000
        return on_device + sum(b - a for a, b in zip(times[::2], times[1::2], strict=False))


CLOCK = WorkClock()  # a process is one rank
