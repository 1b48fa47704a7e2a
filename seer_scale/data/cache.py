"""Copies of remote shards on the local disk, shared by all processes of a node.

    FOLDER/shards/   copies, `<digest of url>-<size>-<digest of tag>.tar`, and downloads, `.part`
    FOLDER/indexes/  where the images of a shard lie
    FOLDER/locks/    one empty file per shard: who downloads it; never deleted

Whoever reads a copy holds its file locked in shared mode, whoever downloads one exclusively. What
can be locked exclusively is therefore in nobody's use. The kernel drops the locks of a process
that dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import xxhash
from filelock import FileLock

from seer_scale.data.addresses import redact
from seer_scale.data.remote import Retry, Stat, fetch, stat
from seer_scale.errors import DataError

DEFAULT_LIMIT = 50 << 30


class Copy(NamedTuple):
    """An open local copy.

    Attributes:
        file: at its beginning; the copy is not deleted before this is closed.
        mark: of the tag that the shard had when it was downloaded.
    """

    file: FileIO
    mark: str


class Cache:
    """Local copies of remote shards, up to a size; what was not used for longest goes first.

    Copies that somebody reads are not deleted. The limit is exceeded where more than it allows is
    read at the same time.

    Args:
        folder: created where it does not exist.
        limit_bytes: of copies and indexes together.
        retry: how patiently the servers are asked.

    Raises:
        DataError: the folder cannot be used, or the limit is not positive.
    """

    def __init__(self, folder: Path, limit_bytes: int, retry: Retry | None = None) -> None:
        if limit_bytes <= 0:
            raise DataError(
                f"the size limit of the data cache is {limit_bytes} bytes: it has to be positive"
            )
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self.retry = retry or Retry()
        self._shards = self.folder / "shards"
        self.indexes = self.folder / "indexes"
        self._locks = self.folder / "locks"
        try:
            for part in (self._shards, self.indexes, self._locks):
                part.mkdir(parents=True, exist_ok=True)
            with self._space():
                pass
        except OSError as error:
            raise DataError(
                f"the data cache {self.folder} cannot be written ({error.strerror or error}): name "
                "another folder as data.cache_dir"
            ) from error

    def open(self, url: str, size: int | None = None, tag: str = "") -> Copy:
        """The whole shard, opened for reading; downloaded first where no copy is there.

        Args:
            url: address of the shard.
            size: bytes that it has to have, where that is known.
            tag: that `remote.stat` has to tell of it, where that is known.

        Raises:
            OSError: it cannot be downloaded, is not what size and tag say, or the disk is full.
        """
        key = _digest(url)
        copy = self._find(key, size, tag)
        if copy is None:
            with FileLock(self._locks / f"{key}.lock"):
                copy = self._find(key, size, tag) or self._download(key, url, size, tag)
        return copy

    def local(self, url: str, size: int | None = None, tag: str = "") -> Path:
        """Path of the copy, like `open`; it may be deleted as soon as others need the space."""
        copy = self.open(url, size, tag)
        with copy.file as file:
            return self._path(_digest(url), os.fstat(file.fileno()).st_size, copy.mark)

    def used_bytes(self) -> int:
        """What copies, downloads and indexes take."""
        return sum(entry.stat().st_size for entry in self._entries())

    def _path(self, key: str, size: int, tag_mark: str) -> Path:
        return self._shards / f"{key}-{size}-{tag_mark}.tar"

    def _find(self, key: str, size: int | None, tag: str) -> Copy | None:
        pattern = f"{key}-{'*' if size is None else size}-{mark(tag) if tag else '*'}.tar"
        for path in self._shards.glob(pattern):
            try:
                file = FileIO(path)
            except FileNotFoundError:  # deleted this moment
                continue
            fcntl.flock(file, fcntl.LOCK_SH)
            _, expected_size, tag_mark = path.stem.split("-")
            if os.fstat(file.fileno()).st_size == int(expected_size):
                os.utime(file.fileno())
                return Copy(file, tag_mark)
            file.close()
            path.unlink(missing_ok=True)  # cut off by a crash of the machine
        return None

    def _download(self, key: str, url: str, size: int | None, tag: str) -> Copy:
        there = stat(url, self.retry)
        if size is not None and there.size != size:
            raise OSError(errno.ESTALE, f"it has {there.size} bytes instead of {size}", redact(url))
        if tag and there.tag != tag:
            raise OSError(errno.ESTALE, "it has changed since it was indexed", redact(url))
        part = self._shards / f"{key}.part"
        file = self._reserve(part, there, url)
        try:
            fetch(url, there, file.fileno(), self.retry)
            os.fsync(file.fileno())
            part.rename(self._path(key, there.size, mark(there.tag)))
            fcntl.flock(file, fcntl.LOCK_SH)
        except BaseException:
            part.unlink(missing_ok=True)
            file.close()
            raise
        return Copy(file, mark(there.tag))

    def _reserve(self, part: Path, there: Stat, url: str) -> FileIO:
        """An empty file with all its space, so that a full disk is noticed before the download."""
        with self._space():
            self._make_room(there.size)
            file = FileIO(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC), "r+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if there.size:
                    os.posix_fallocate(file.fileno(), 0, there.size)
            except OSError as error:
                part.unlink(missing_ok=True)
                file.close()
                raise OSError(
                    error.errno, f"no space for {there.size} bytes: {error.strerror}", redact(url)
                ) from error
        return file

    def _make_room(self, need: int) -> None:
        """Deletes what lies unused longest; copies before indexes, which are small and dear."""
        found = []
        for entry in self._entries():
            with suppress(FileNotFoundError):
                status = entry.stat()
                rank = {".part": 0, ".npz": 2}.get(entry.suffix, 1)
                found.append((rank, status.st_mtime_ns, status.st_size, entry))
        excess = sum(size for _, _, size, _ in found) + need - self.limit_bytes
        for rank, _, size, entry in sorted(found):
            # What a killed process left behind goes in any case.
            if (rank == 0 or excess > 0) and _delete_unused(entry):
                excess -= size

    def _entries(self) -> Iterator[Path]:
        yield from self._shards.iterdir()
        yield from self.indexes.iterdir()

    @contextmanager
    def _space(self) -> Iterator[None]:
        """One process at a time makes room and takes it."""
        with FileLock(self.folder / "space.lock"):
            yield


def default_folder() -> Path:
    """Below `$XDG_CACHE_HOME` or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "seer-scale" / "shards"


def default_cache() -> Cache:
    """In the default folder, with the default limit."""
    return Cache(default_folder(), DEFAULT_LIMIT)


def mark(tag: str) -> str:
    """Eight hex digits for a tag, which may hold any characters."""
    return _digest(tag)[:8]


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))


def _delete_unused(path: Path) -> bool:
    """Deletes a file that nobody has locked; whether it did."""
    try:
        with FileIO(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True
