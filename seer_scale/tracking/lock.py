"""One sender at a time: a lock in the run folder that dies with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

LOCK = "lock"


class SenderLock:
    """The right to send a run's spool; survives a fork, ends with the last process that has it."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[str] = (folder / LOCK).open("a+")

    def acquire(self) -> bool:
        """Takes the lock if nobody has it, and writes this process's id into the file."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.sign()
        return True

    def sign(self) -> None:
        """Writes this process's id into the file; needed after a fork."""
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        """Lets others send."""
        self._file.close()


def holder(folder: Path) -> int | None:
    """Process id of the sender at work; None if there is none."""
    path = folder / LOCK
    if not path.exists():
        return None
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read().strip()
            return int(text) if text else 0
        return None
