"""Who sends a run's records, and who writes them; on file systems with and without locks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO

from seer_scale.storage.locks import lock
from seer_scale.storage.ownership import Claim, living_owner


class SenderLock:
    """The right to send the records of `<run_dir>/tracking`; ends with the process that has it."""

    def __init__(self, folder: Path) -> None:
        self._claim = Claim(folder)

    def acquire(self) -> bool:
        """Takes the right if nobody has it."""
        return self._claim.take() is None

    def release(self) -> None:
        """Gives the right up."""
        self._claim.release()


def holder(folder: Path) -> int | None:
    """Process id of the active sender; None without a sender."""
    owner = living_owner(folder)
    return None if owner is None else owner.pid


def mark_as_written(spool: IO[bytes]) -> None:
    """Marks the open file `spool` as being written, until this process closes the file or ends."""
    with contextlib.suppress(OSError):  # it costs the mark only
        lock(spool, shared=True)


def is_written(spool: Path) -> bool:
    """Tells whether a process has marked the file `spool` as being written.

    Without locks, a run that has an owner counts as being written.
    """
    with spool.open("rb+") as file:  # NFS locks exclusively only what is open for writing
        free = lock(file)
    return living_owner(spool.parents[1]) is not None if free is None else not free
