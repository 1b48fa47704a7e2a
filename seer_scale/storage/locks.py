"""Locks of files, on file systems that may have none."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import sys
from pathlib import Path
from typing import IO

_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_warned: set[int] = set()  # file systems


def lock(file: IO[bytes] | int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Locks an open file until it is closed; True, False if another holds it, None without locks.

    NFS wants a file open for writing for an exclusive lock, and one open for reading for a shared.

    Args:
        file: an open file or its descriptor.
        shared: excludes exclusive locks only.
        wait: waits for other holders instead of returning False.

    Raises:
        OSError: for any other reason.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, how if wait else how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def warn_without_locks(path: Path) -> None:
    """Warns once for each file system, in one process of a run."""
    device = os.stat(path.parent).st_dev
    told = device in _warned or multiprocessing.parent_process() is not None
    _warned.add(device)
    if not told and os.environ.get("RANK", "0") == "0":
        print(
            f"warning: the file system of {path} has no locks: it is still written by one process "
            "at a time, but one that is killed on another machine is noticed later",
            file=sys.stderr,
            flush=True,
        )
