"""The mark of a process: who it is, and whether it lives, as far as this machine can tell."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from seer_scale.storage.locks import lock


@dataclass(frozen=True)
class Owner:
    """Who owns a path; `started` is the start of the process in ticks since the machine's.

    While the mark is being written, `pid` is 0.
    """

    host: str
    machine: str
    pid: int
    started: int | None
    attempt: str
    since: str
    command: str

    def __str__(self) -> str:
        if not self.pid:
            return "a process whose mark is empty"
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since})"

    def lives(self) -> bool | None:
        """Tells whether the process lives; None if this machine cannot tell."""
        if not self.machine or self.machine != _machine():
            return None
        try:
            return _started(self.pid) == self.started
        except (FileNotFoundError, ProcessLookupError):
            return None if _is_hidden(self.pid) else False


def look(mark: Path) -> tuple[Owner, int, bool | None]:
    """Reads a mark: its owner, when it was touched in ns, and whether the owner lives."""
    with mark.open("rb") as file:
        try:
            owner = Owner(**json.load(file))
        except (ValueError, TypeError):  # being written
            owner = Owner("", "", 0, None, "", "", "")
        lives = owner.lives()
        if not lives and lock(file, shared=True) is False:
            lives = True  # what the owner has started holds the lock for it
        return owner, os.fstat(file.fileno()).st_mtime_ns, lives


def this_process() -> Owner:
    """Describes this process."""
    return Owner(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()) if _machine() else None,
        attempt=secrets.token_hex(4),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=os.path.basename(sys.argv[0]),  # arguments may hold secrets
    )


@cache
def _machine() -> str:
    """Names the machine since its start, and the processes that can be seen: those of a container
    are its own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Returns when a process started, in ticks; None if it has ended and nobody asked for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _is_hidden(pid: int) -> bool:
    """Tells whether another user's process lives, where /proc shows one's own only."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        pass
    return False
