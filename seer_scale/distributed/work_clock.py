"""Clock of a rank's own work: time inside of collectives is excluded.

Ranks wait for each other in every collective, so that a whole step takes the same time on all ranks
and does not show which one is slow. On a GPU the marks are events on its stream. The host does not
wait for them; they are read after the step, when they have long happened.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WorkClock:
    """Sums the times between marks; the rank works from the first mark of a pair to the second."""

    def __init__(self) -> None:
        self.running = False
        self._device = torch.device("cpu")
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []  # reused in the next step
        self._used = 0

    @contextmanager
    def lap(self, device: torch.device) -> Iterator[None]:
        """Runs the clock inside the context.

        Args:
            device: the device whose time counts.
        """
        self._device, self.running = device, True
        self.mark()
        try:
            yield
            self.mark()
        finally:
            self.running = False

    def mark(self) -> None:
        """Stops the clock, or starts it again."""
        if self._device.type != "cuda":
            self._times.append(time.perf_counter())
            return
        if self._used == len(self._events):
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._events.append(event)
        self._events[self._used].record()
        self._used += 1

    def take(self) -> float:
        """Returns the seconds of all laps since the last call.

        The device must have finished the work of these laps.
        """
        times, events = self._times, self._events[: self._used]
        self._times, self._used = [], 0
        laps = zip(events[::2], events[1::2], strict=False)
        on_device = float(sum(begin.elapsed_time(end) for begin, end in laps)) / 1000
        return on_device + sum(b - a for a, b in zip(times[::2], times[1::2], strict=False))


CLOCK = WorkClock()  # one per process, because a process is one rank
