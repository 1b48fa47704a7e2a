"""Mistakes that a user can correct: one sentence each, an exit status, no traceback.

Everything else (a bug, a broken machine) stays an ordinary exception with a traceback.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NoReturn

# A run that a signal stopped has saved; start it again with --resume auto (EX_TEMPFAIL of
# sysexits.h). A run that lost a rank needs the same, and has not saved.
REQUEUE_STATUS = 75
LOST_RANK_STATUS = 76
# Batch systems send the first two before they take a job's machines away.
REQUEUE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_SIGNALS = (signal.SIGINT, *REQUEUE_SIGNALS)
LONGEST = 1500  # characters of a sentence


class UserError(Exception):
    """A mistake outside the program; the message is the whole sentence that the user sees."""

    exit_status = 1

    def __str__(self) -> str:
        """The message on one line, with unprintable characters escaped."""
        text = "".join(
            char if char.isprintable() else repr(char)[1:-1] for char in super().__str__()
        )
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


class ConfigError(UserError):
    """A wrong key, value or combination, found before any process group or model exists."""

    exit_status = 2


class DataError(UserError):
    """Training data that is missing, empty or unreadable."""


class CheckpointError(UserError):
    """A checkpoint that is missing, half written or belongs to another model."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ': did you mean a or b?', or '' if no known name resembles `name`."""
    near = difflib.get_close_matches(name, list(known), n=2)
    return f": did you mean {' or '.join(near)}?" if near else ""


def suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    """Returns 'did you mean a? ' and `otherwise` as a sentence, or `otherwise` alone."""
    near = difflib.get_close_matches(name, list(known), n=1)
    if not near:
        return otherwise
    return f"did you mean {near[0]}? {otherwise[0].upper()}{otherwise[1:]}"


def examples(names: Sequence[str], most: int = 3) -> str:
    """Returns the first names as a list in a sentence, with `...` if there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def exit_with(error: UserError) -> NoReturn:
    """Prints the sentence on standard error and exits with the error's status.

    Ranks usually find the same mistake at the same time. Other ranks wait for a moment, so that
    rank 0 prints for all and the launcher ends them; then they print their own mistake.
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
