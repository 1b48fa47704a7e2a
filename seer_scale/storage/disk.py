"""Writes a file from beginning to end, past the page cache if the file system can.

The page cache would move gigabytes through memory several times more, and evict the images that the
training reads again. Here all bytes pass through one small buffer, which stays in the processor's
cache and from which the disk reads.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

BUFFER = 4 << 20  # bytes that are written at once; a multiple of every disk's block
BLOCK = 4096  # bytes; the end of a file may be less than one
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class DiskWriter:
    """Writes a file and replaces an older one; the file is whole once `finish` has returned.

    Raises:
        OSError: from any method, if the disk is full or does not write.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor, self._direct = os.open(path, flags | _DIRECT, 0o666), bool(_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor, self._direct = os.open(path, flags, 0o666), False
        self._buffer = np.frombuffer(mmap.mmap(-1, BUFFER), dtype=np.uint8)  # begins with a page
        self._filled = 0

    def room(self) -> NDArray[np.uint8]:
        """Memory for the next bytes of the file, at least one; `advance` then takes them in."""
        return self._buffer[self._filled :]

    def advance(self, count: int) -> None:
        """Takes the first `count` bytes of `room()` into the file."""
        self._filled += count
        if self._filled == BUFFER:
            self._put(self._buffer)
            self._filled = 0

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes."""
        source = np.frombuffer(data, dtype=np.uint8)
        while len(source):
            room = self.room()[: len(source)]
            np.copyto(room, source[: len(room)])  # NumPy lets other threads run meanwhile
            source = source[len(room) :]
            self.advance(len(room))

    def finish(self) -> None:
        """Writes the rest, and waits until the disk has everything."""
        whole_blocks = self._filled // BLOCK * BLOCK
        self._put(self._buffer[:whole_blocks])
        self._through_the_cache()  # the end of a file is not a whole block
        self._put(self._buffer[whole_blocks : self._filled])
        os.fsync(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def _put(self, data: NDArray[np.uint8]) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.write(self._descriptor, data[done:].data)
            except OSError as error:
                if not (self._direct and error.errno == errno.EINVAL):
                    raise
                self._through_the_cache()
                continue
            if self._direct and done % BLOCK:  # the disk filled up, or it has its own mind
                self._through_the_cache()

    def _through_the_cache(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            self._direct = False
