"""A file written from its beginning to its end, past the page cache where the file system can.

Through the page cache gigabytes cost the processor twice their copying, and push out the images
that the training reads again. Here the disk takes the bytes from where they are, if they lie in
step with the file's blocks; others go through a small buffer that does.
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
BLOCK = 4096  # bytes that are in step with a disk's are written from where they are
_WORTH_IT = 64 << 10  # bytes; fewer are copied faster than the disk is asked
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class DiskWriter:
    """Writes a file; what was there is replaced. Whole once `finish` has returned.

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

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes; without a copy if they lie at an address that is, modulo `BLOCK`, their
        place in the file.
        """
        source = np.frombuffer(data, dtype=np.uint8)
        while len(source):
            in_step = (source.ctypes.data - self._filled) % BLOCK == 0
            from_there = self._direct and in_step and len(source) >= _WORTH_IT
            if from_there and self._filled % BLOCK == 0:
                count = len(source) // BLOCK * BLOCK
                self._put(self._buffer[: self._filled])
                self._put(source[:count])
                source, self._filled = source[count:], 0
                continue
            room = -self._filled % BLOCK if from_there else BUFFER - self._filled
            count = min(len(source), room)
            # NumPy lets other threads run meanwhile.
            np.copyto(self._buffer[self._filled : self._filled + count], source[:count])
            source, self._filled = source[count:], self._filled + count
            if self._filled == BUFFER:
                self._put(self._buffer)
                self._filled = 0

    def finish(self) -> None:
        """Puts the rest on the disk, and all of it for good."""
        whole_blocks = self._filled // BLOCK * BLOCK
        self._put(self._buffer[:whole_blocks])
        self._through_the_cache()  # the end of a file is no whole block
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
