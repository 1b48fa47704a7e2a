"""Phases of a step: one `with` marks a phase for the watchdog, the profile and the work clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch

from seer_scale.distributed.watchdog import Watchdog
from seer_scale.distributed.work_clock import CLOCK
from seer_scale.performance.profiler import Profiler

Phase = Literal["data", "forward", "loss", "backward", "optimizer"]
# What the watchdog names from this phase on, until another phase of the list begins.
WATCHED: dict[Phase, str] = {"data": "waiting for images", "forward": "computing"}
# What the watchdog names after the last backward pass of a step, and its number in the step.
UPDATING, LAST = "updating", 1 << 30
# What the watchdog may end by a limit that it learns: no disk and no server is waited for.
RANKS_ONLY = frozenset({WATCHED["forward"], UPDATING})
# Phases that count as a rank's own work. The others wait for other ranks inside of torch.
OWN_WORK: frozenset[Phase] = frozenset({"data", "forward", "loss"})


class Phases:
    """Marks the phases of this rank's steps.

    Args:
        device: device of this rank, whose time the work clock counts.
        watchdog: watchdog of this rank.
        profiler: profiler of this rank, whose trace shows every phase.

    Attributes:
        seconds: wall-clock time that each phase has taken in this step.
    """

    def __init__(self, device: torch.device, watchdog: Watchdog, profiler: Profiler) -> None:
        self._device, self._watchdog, self._profiler = device, watchdog, profiler
        self._step = self._marks = 0
        self.seconds: defaultdict[Phase, float] = defaultdict(float)
        CLOCK.take()  # drops what an earlier trainer of this process has left

    def begin(self, step: int) -> float:
        """Begins a step, counted from 1; returns the seconds of own work in the step before."""
        self._step, self._marks = step, 0
        self.seconds.clear()
        return CLOCK.take()

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Marks what happens inside of the `with` as one phase of the step."""
        began = time.perf_counter()
        if phase in WATCHED:
            self._watchdog.at(self._step, self._marks, WATCHED[phase])
            self._marks += 1
        work = CLOCK.lap(self._device) if phase in OWN_WORK else nullcontext()
        with work, self._profiler.range(phase):
            yield
        self.seconds[phase] += time.perf_counter() - began
