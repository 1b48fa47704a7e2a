"""Mistakes that a user can mend: one sentence each, an exit status, no traceback.

Everything else (a bug, a broken machine) stays an ordinary exception with its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

# A run that a signal stopped has saved and wants to be started again with --resume auto
# (EX_TEMPFAIL of sysexits.h); one that lost a rank wants the same, and has not saved.
REQUEUE_STATUS = 75
LOST_RANK_STATUS = 76
LONGEST = 1500  # characters of a sentence


class UserError(Exception):
    """A mistake outside the program; its message is the whole sentence the user sees."""

    exit_status = 1

    def __str__(self) -> str:
        """One line that a terminal may show, whatever the key or the name in it holds."""
        text = "".join(
            char if char.isprintable() else repr(char)[1:-1] for char in super().__str__()
        )
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


class ConfigError(UserError):
    """A wrong key, value or combination; found before any process group or model exists."""

    exit_status = 2


class DataError(UserError):
    """Training data that is missing, empty or unreadable."""


class CheckpointError(UserError):
    """A checkpoint that is missing, half written or belongs to another model."""


def exit_with(error: UserError) -> NoReturn:
    """Prints the sentence on standard error and leaves with the error's status.

    Ranks usually find the same mistake at the same time. The others give rank 0 a moment to say it
    for all and are ended by the launcher meanwhile; a mistake that only they see, they say.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    with suppress(OSError):  # the streams may be files on a full disk
        said = f"[rank {rank}] " if rank != "0" else ""
        print(f"{said}error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    # Not sys.exit: threads of a process group that other ranks still wait in would hold it up.
    os._exit(error.exit_status)
