"""Who is at work in a run folder, told by locks that die with the processes that hold them.

One sender at a time has the file `lock`; whoever writes the spool shares a lock on that.
"""

from __future__ import annotations

import contextlib
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


def mark_as_written(spool: IO[bytes]) -> None:
    """Says, until this process closes it or ends, that the open file `spool` is being written."""
    with contextlib.suppress(OSError):  # a file system without locks; it costs the mark only
        fcntl.flock(spool, fcntl.LOCK_SH | fcntl.LOCK_NB)


def is_written(spool: Path) -> bool:
    """Whether some process has marked the file `spool` as being written."""
    with spool.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
