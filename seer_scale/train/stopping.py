"""Reasons to end a run before its last step, and the signals that ask for it.

The first signal asks: the step is finished and saved. The second one ends the process at once,
because a step may wait for images, a save or an evaluation that never come. The main thread may
then stand still in a read of a dead network mount and hear nothing, so another thread counts the
signals.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress
from enum import Enum
from types import FrameType
from typing import NoReturn

from seer_scale.errors import LOST_RANK_STATUS, REQUEUE_SIGNALS, STOP_SIGNALS

# Seconds in which a launcher passes on the signal that its ranks have got from a terminal too.
TOGETHER_S = 1.0
_LOOK_S = 0.25  # seconds after which the thread looks for signals that the main thread left


class Stop(Enum):
    """Reason why a run ended."""

    NO = "the last step"
    DONE = "a user asked it to end"  # SIGINT
    REQUEUE = "its machines are taken away; it shall go on elsewhere"
    REWIND = "its loss jumped; it shall go on from its last checkpoint"


class StopSignals:
    """Catches signals to stop, so that the present step can end first, until `close`.

    A second signal, more than `TOGETHER_S` after the first, ends the process. SIGUSR1 is a batch
    system's early warning: another signal after it counts as the first.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._first: tuple[int, float] | None = None  # the signal that asked, and its time
        self._handlers = {signum: signal.signal(signum, self._receive) for signum in STOP_SIGNALS}
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Python's own handlers run in the main thread alone; this pipe hears of every signal.
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
        self._thread.start()

    @property
    def wish(self) -> Stop:
        """This rank's wish to stop, from the last signal."""
        if self._received is None:
            return Stop.NO
        return Stop.REQUEUE if self._received in REQUEUE_SIGNALS else Stop.DONE

    def close(self) -> None:
        """Restores the signal handlers of before."""
        if self._closed.is_set():
            return
        self._closed.set()
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # wakes the thread
        self._thread.join()
        os.close(self._reader)
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum

    # ----------------------------------------------------------------------------- in the thread

    def _listen(self) -> None:
        # A signal goes to the main thread first. If that thread stands still in the system, the
        # signal stays with the process, and whoever blocks it can take it.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        while not self._closed.is_set():
            heard: list[int] = []
            if select.select([self._reader], [], [], _LOOK_S)[0]:
                heard += os.read(self._reader, 64)
            if (left := signal.sigtimedwait(STOP_SIGNALS, 0)) is not None:
                heard.append(left.si_signo)
            for signum in heard:
                if signum in STOP_SIGNALS:
                    self._count(signum)

    def _count(self, signum: int) -> None:
        self._received, now = signum, time.monotonic()
        first, since = self._first or (None, now)
        if first is None or (first == signal.SIGUSR1 and signum != signal.SIGUSR1):
            self._first = (signum, now)
            if os.environ.get("RANK", "0") == "0":
                _say(
                    f"{_name(signum)}: the run finishes this step, saves and ends; a second signal "
                    "ends it at once, without saving"
                )
        elif now - since > TOGETHER_S:
            _end(signum)


def _end(signum: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    _say(
        f"error: rank {rank} was ended at once by a second signal ({_name(signum)}), before it had "
        "saved: the steps since the last checkpoint are lost; go on with --resume auto"
    )
    # A batch system starts the run again after the first of these statuses.
    os._exit(LOST_RANK_STATUS if signum in REQUEUE_SIGNALS else 128 + signum)


def _say(text: str) -> None:
    """Writes a line on standard error; not by print, whose lock a thread at rest may hold."""
    with suppress(OSError):  # a full disk, a closed terminal
        os.write(2, f"{text}\n".encode())


def _name(signum: int) -> str:
    return signal.Signals(signum).name
