"""Owners of what is being written: one process at a time, on any file system.

    FOLDER/.owner/00007     the owner's mark in a folder: JSON, touched every `BEAT_S`
    .NAME.owner/00007       the mark beside a file, or beside a folder whose content is exchanged

Whoever wants a path makes the mark of the next number, which every file system lets only one
process do. An owner that has ended without a word is found out: on the same machine by its process
id and start time, elsewhere by a mark that nobody touches for `SILENT_S`. The owner also locks its
mark where the file system has locks, and whoever holds that lock lives. Nothing depends on locks:
Lustre and NFS may have none.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from seer_scale.errors import UserError
from seer_scale.storage.locks import lock, warn_without_locks
from seer_scale.storage.owner import Owner, look, this_process

BEAT_S = 5.0
SILENT_S = 60.0
_POLL_S = 0.2
_QUIET_S = 2.0  # a mark is empty while its owner writes it; this is not worth a sentence


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Lets one thread or process at a time run the block; the others wait.

    Args:
        path: a file for the lock, made if it is missing; without locks, owned for that time.

    Raises:
        OSError: if the file cannot be made.
    """
    with path.open("a+b") as file:
        if lock(file, wait=True):
            yield
            return
    with owned(path, path.name, beside=True, wait=True, say=lambda text: None):
        yield


class Found(NamedTuple):
    """The owner that a claim met, and whether it lives; None if that is not known yet."""

    owner: Owner
    lives: bool | None


class Claim:
    """A claim to a path, by one process.

    Args:
        path: the path to own.
        beside: the mark lies beside the path and not in it.
        inherited: processes that this one starts without closing its files are owners too, where
            the file system has locks.
        lost: is told in a sentence that another process took this one for dead and took over.
    """

    def __init__(
        self,
        path: Path,
        *,
        beside: bool = False,
        inherited: bool = False,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        self.path = path
        self._marks, self._beside = _marks(path, beside), beside
        self._inherited, self._lost = inherited, lost
        self._number, self._file = 0, -1
        self._makes_folder = False
        self._over = threading.Event()
        self._looked: tuple[int, int, float] | None = None  # number, time of the mark, when

    def take(self) -> Found | None:
        """Takes the path, unless it has an owner that lives or may live; never waits for it.

        Returns:
            None if it is taken, now or before; or the owner. Asked again and again, the claim finds
            out whether it lives.

        Raises:
            OSError: if the mark cannot be written.
        """
        if self._number:
            return None
        self._makes_folder = self._makes_folder or not (self._beside or self.path.exists())
        while True:
            self._marks.mkdir(parents=True, exist_ok=True)
            newest, dead = max(self._numbers(), default=0), None
            try:
                if newest:
                    found = self._judge(newest)
                    if found.lives is not False:
                        return found
                    dead = found.owner
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._file = os.open(self._mark(newest + 1), flags, 0o666)
            except (FileNotFoundError, FileExistsError):  # another came or went just now
                time.sleep(0.01)
                continue
            self._number = newest + 1
            try:
                os.write(self._file, json.dumps(asdict(this_process())).encode())
                os.fsync(self._file)
            except OSError as error:
                self.release()
                raise OSError(error.errno, error.strerror, str(self._marks)) from error
            there = self._numbers()
            # Another may have judged the same owner earlier, and taken over and even ended since.
            if max(there) > self._number or self._owner(newest) != dead:
                self.release()
                continue
            self._hold(there)
            return None

    def release(self) -> None:
        """Gives the path up; leaves nothing behind."""
        self._over.set()
        if not self._number:
            return
        with suppress(OSError):
            self._mark(self._number).unlink()
        os.close(self._file)
        self._number = 0
        with suppress(OSError):  # another's mark is in it
            self._marks.rmdir()
            if self._makes_folder:
                self.path.rmdir()

    def _hold(self, there: list[int]) -> None:
        if lock(self._file, wait=True) is None:
            warn_without_locks(self.path)
        os.set_inheritable(self._file, self._inherited)
        for number in there:
            if number < self._number:
                self._mark(number).unlink(missing_ok=True)
        self._over = threading.Event()
        threading.Thread(
            target=self._beat, args=(self._number, self._over), name="owner", daemon=True
        ).start()

    def _beat(self, number: int, over: threading.Event) -> None:
        later = 0
        while not over.wait(BEAT_S):
            try:
                os.utime(self._mark(number))
                # Twice: a claim that comes too late makes a mark for a moment.
                later = later + 1 if max(self._numbers()) > number else 0
            except (OSError, ValueError):  # of a disk that is away, or a folder that was deleted
                continue
            if later == 2 and self._lost is not None:
                self._lost(
                    f"{self.path} was taken over by another process, since this one gave no sign "
                    f"of life for {SILENT_S:g} s: this one ends"
                )

    def _judge(self, number: int) -> Found:
        owner, touched, lives = look(self._mark(number))
        if lives is None:
            lives = self._watch(number, touched)
        return Found(owner, lives)

    def _watch(self, number: int, touched: int) -> bool | None:
        """Judges a mark by whether it is touched while this process looks."""
        now = time.monotonic()
        if self._looked is None or self._looked[:2] != (number, touched):
            beats = self._looked is not None and self._looked[0] == number
            self._looked = (number, touched, now)
            return True if beats else None
        silent = now - self._looked[2]
        enough = 2 * BEAT_S if time.time() - touched / 1e9 > SILENT_S else SILENT_S
        return False if silent > enough else None

    def _owner(self, number: int) -> Owner | None:
        try:
            return look(self._mark(number))[0]
        except FileNotFoundError:
            return None

    def _mark(self, number: int) -> Path:
        return self._marks / f"{number:05d}"

    def _numbers(self) -> list[int]:
        return _numbers(self._marks)


@contextmanager
def owned(
    path: Path,
    name: str,
    *,
    beside: bool = False,
    inherited: bool = False,
    wait: bool = False,
    say: Callable[[str], None] | None = None,
    lost: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Owns a path while the block runs.

    Args:
        path, beside, inherited, lost: see `Claim`.
        name: what the user calls the path, for messages.
        wait: waits for an owner that lives, instead of refusing.
        say: is told what this waits for; standard error unless given.

    Raises:
        UserError: if another process owns the path.
        OSError: if the mark cannot be written.
    """
    claim, told = Claim(path, beside=beside, inherited=inherited, lost=lost), False
    begun = time.monotonic()
    while (found := claim.take()) is not None:
        owner = found.owner
        if found.lives and not wait:
            raise UserError(
                f"{name} is in use by {owner}: wait until that has ended or end it (kill "
                f"{owner.pid} on {owner.host}), or name another place"
            )
        if not told and (owner.pid or time.monotonic() - begun > _QUIET_S):
            (say or _say)(
                f"{name} is in use by {owner}: waiting until it ends"
                if found.lives
                else f"{name} was last used by {owner}: waiting up to {SILENT_S:g} s for a sign of "
                "its life"
            )
            told = True
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        claim.release()


def living_owner(path: Path, *, beside: bool = False) -> Owner | None:
    """Finds the owner of a path; one on another machine counts if its mark is fresh."""
    marks = _marks(path, beside)
    try:
        owner, touched, lives = look(marks / f"{max(_numbers(marks)):05d}")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if lives is None:
        lives = time.time() - touched / 1e9 < SILENT_S
    return owner if lives else None


def _marks(path: Path, beside: bool) -> Path:
    path = path.resolve()
    return path.with_name(f".{path.name}.owner") if beside else path / ".owner"


def _numbers(marks: Path) -> list[int]:
    return [int(name) for name in os.listdir(marks) if name.isdecimal()]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
