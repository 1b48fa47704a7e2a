"""Why a run ends before its last step, and the signals that ask it to."""

from __future__ import annotations

import signal
from enum import Enum
from types import FrameType

# What batch systems send before they take a job's machines away.
REQUEUE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop(Enum):
    """Why a run ended before its last step, if it did."""

    NO = "the last step"
    DONE = "somebody wants it to end"  # SIGINT
    REQUEUE = "its machines are taken away, and it is to go on elsewhere"
    REWIND = "its loss jumped, and it is to go on from its last checkpoint"


class StopSignals:
    """Remembers a signal to stop until a step has ended, from here to `close`."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._handlers = {
            signum: signal.signal(signum, self._receive)
            for signum in (signal.SIGINT, *REQUEUE_SIGNALS)
        }

    @property
    def wish(self) -> Stop:
        """What this rank was asked for."""
        if self._received is None:
            return Stop.NO
        return Stop.REQUEUE if self._received in REQUEUE_SIGNALS else Stop.DONE

    def close(self) -> None:
        """Signals mean what they meant before."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
