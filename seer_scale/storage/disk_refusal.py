"""Refusals of a disk (full, over quota, read-only, no permission) as a sentence for the user.

Whoever writes raises what the system says, and only the command knows what the user typed. The
system names a file only where it could not be opened: a write that fails says "no space left" and
not where. So the place is looked for among those that the command line names.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "have it mounted for writing",
    errno.EACCES: "see to its permissions",
}
HARDLY_ANY = 1 << 20  # bytes: a disk with less may have refused a write


def refusal(error: BaseException) -> OSError | None:
    """Finds the disk's refusal in an exception or its causes; None for any other exception."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in ADVICE:
            return seen
        if isinstance(seen, sqlite3.OperationalError) and _is_full(seen):  # MLflow's database
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seen = seen.__cause__
    return None


def sentence(error: OSError, argv: Sequence[str]) -> str:
    """Sentence for the user about a refusal.

    Args:
        error: see `refusal`.
        argv: the command line, which names the places that may be full.
    """
    where = error.filename or ", ".join(_full(argv)) or "the disk"
    advice = ADVICE[error.errno or 0]
    return f"{where} cannot be used ({error.strerror}): {advice}, or name another place"


def existing_part(path: Path) -> Path:
    """Finds the part of a path that exists: itself, or the nearest folder above it."""
    whole = path.absolute()
    return next(place for place in (whole, *whole.parents) if os.path.exists(place))


def _is_full(error: sqlite3.OperationalError) -> bool:
    # Not there if it was not SQLite that raised.
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def _full(argv: Sequence[str]) -> Iterator[str]:
    """Paths of the command line, and default paths, that lie on a full disk."""
    for label, path in [*_named(argv), *_implied()]:
        room = os.statvfs(existing_part(path))
        # Images that are mounted read-only and the like have nothing free by nature.
        written_to = room.f_blocks and not room.f_flag & os.ST_RDONLY
        if written_to and room.f_bavail * room.f_frsize < HARDLY_ANY:
            yield label


def _named(argv: Sequence[str]) -> Iterator[tuple[str, Path]]:
    before = ""
    for word in argv:
        value = (word.partition("=")[2] or word).removeprefix("sqlite:///")
        if os.sep in value and "://" not in value:  # a bare name lies in the current folder
            of_an_option = before.startswith("--") and "=" not in word
            yield f"{before} {word}" if of_an_option else word, Path(value).absolute()
        before = word


def _implied() -> Iterator[tuple[str, Path]]:
    yield "the current folder", Path.cwd()
    yield "the folder for temporary files", Path(tempfile.gettempdir())
    if os.path.isfile("/dev/stdout"):
        yield "standard output", Path("/dev/stdout")
