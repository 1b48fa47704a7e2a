"""Signals that stop a study: its run saves and ends first, and the same command goes on later."""

from __future__ import annotations

import signal
from types import FrameType

from seer_scale.errors import REQUEUE_STATUS, STOP_SIGNALS, UserError


class StoppedError(UserError):
    """A study that was asked to stop; started again, it goes on."""

    exit_status = REQUEUE_STATUS


class StopSignals:
    """Catches the first SIGTERM, SIGUSR1 or SIGINT until `close`; a second has its usual effect."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._handlers = {signum: signal.signal(signum, self._receive) for signum in STOP_SIGNALS}

    def check(self) -> None:
        """Ends the study if a signal has come.

        Raises:
            StoppedError: after SIGTERM and SIGUSR1.
            KeyboardInterrupt: after SIGINT.
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise StoppedError(f"{signal.Signals(self.received).name} stopped the study")

    def close(self) -> None:
        """Restores the signal handlers of before."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self.close()
