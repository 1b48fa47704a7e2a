"""Copies of remote shards on the local disk, shared by all processes of a node.

    FOLDER/shards/   copies, `<digest of url>-<size>-<digest of tag>.tar`, and downloads, `.part`
    FOLDER/indexes/  the places of the images in each shard
    FOLDER/locks/    one empty file per shard and per index, locked while it is fetched or built;
                     never deleted

A reader of a copy holds a shared lock on its file, a download an exclusive one. A file that can be
locked exclusively is therefore unused. The kernel drops the locks of a process that dies.

On a file system without locks a download is owned (see `storage.ownership`), and a copy may be
deleted while it is read: the open file stays until it is closed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import xxhash

from seer_scale.data.addresses import redact
from seer_scale.data.remote import Retry, Stat, fetch, stat
from seer_scale.errors import DataError
from seer_scale.storage.locks import lock
from seer_scale.storage.ownership import exclusive, living_owner

DEFAULT_LIMIT = 50 << 30
SCRATCH = ("SLURM_TMPDIR", "TMPDIR")  # variables that name a disk of the node itself


class Copy(NamedTuple):
    """An open local copy.

    Attributes:
        file: the open file, at its beginning; the copy stays at least until the file is closed.
        mark: short digest of the tag that the shard had at the download.
    """

    file: FileIO
    mark: str


class Cache:
    """Local copies of remote shards, up to a size; the least recently used copies go first.

    A copy that is being read is never deleted. If more than the limit is read at the same time, the
    cache exceeds the limit.

    Args:
        folder: folder of the cache; created if it does not exist.
        limit_bytes: limit of copies and indexes together, in bytes.
        retry: how often and how patiently requests are repeated.
        one_by_one: read the images of remote shards from the server one by one where a manifest
            lists their indexes, and copy only the other shards.

    Raises:
        DataError: the folder cannot be written, or the limit is not positive.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        retry: Retry | None = None,
        *,
        one_by_one: bool = False,
    ) -> None:
        if limit_bytes <= 0:
            raise DataError(
                f"the size limit of the data cache is {limit_bytes} bytes: it has to be positive"
            )
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self.retry = retry or Retry()
        self.one_by_one = one_by_one
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
        """Opens the copy of a shard for reading; downloads the shard first if there is no copy.

        Args:
            url: address of the shard.
            size: expected size in bytes, if known.
            tag: expected tag as in `remote.stat`, if known.

        Raises:
            OSError: the download fails, size or tag differ from the expected ones, or the disk is
                full.
        """
        key = _digest(url)
        copy = self._find(key, size, tag)
        if copy is None:
            with exclusive(self._lock(key)):
                copy = self._find(key, size, tag) or self._download(key, url, size, tag)
        return copy

    def local(self, url: str, size: int | None = None, tag: str = "") -> Path:
        """Returns the path of the copy, like `open`; other downloads may delete the copy later."""
        copy = self.open(url, size, tag)
        with copy.file as file:
            return self._path(_digest(url), os.fstat(file.fileno()).st_size, copy.mark)

    def alone(self, what: object) -> AbstractContextManager[None]:
        """Lets one process of the node at a time make `what`; the others wait, and find it made."""
        return exclusive(self._lock(_digest(repr(what))))

    def used_bytes(self) -> int:
        """Returns the bytes that copies, downloads and indexes take."""
        return sum(entry.stat().st_size for entry in self._entries())

    def _path(self, key: str, size: int, tag_mark: str) -> Path:
        return self._shards / f"{key}-{size}-{tag_mark}.tar"

    def _find(self, key: str, size: int | None, tag: str) -> Copy | None:
        pattern = f"{key}-{'*' if size is None else size}-{mark(tag) if tag else '*'}.tar"
        for path in self._shards.glob(pattern):
            try:
                file = FileIO(path)
            except FileNotFoundError:  # another process deleted it just now
                continue
            lock(file, shared=True, wait=True)
            _, expected_size, tag_mark = path.stem.split("-")
            if os.fstat(file.fileno()).st_size == int(expected_size):
                os.utime(file.fileno())
                return Copy(file, tag_mark)
            file.close()
            path.unlink(missing_ok=True)  # a crash of the machine cut it off
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
            lock(file, shared=True, wait=True)
        except BaseException:
            part.unlink(missing_ok=True)
            file.close()
            raise
        return Copy(file, mark(there.tag))

    def _reserve(self, part: Path, there: Stat, url: str) -> FileIO:
        """Opens a file and allocates its space, so that a full disk shows before the download."""
        with self._space():
            self._make_room(there.size)
            file = FileIO(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC), "r+")
            try:
                lock(file, wait=True)
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
        """Deletes the least recently used files; first copies, then the small indexes."""
        found = []
        for entry in self._entries():
            with suppress(FileNotFoundError):
                status = entry.stat()
                rank = {".part": 0, ".npz": 2}.get(entry.suffix, 1)
                found.append((rank, status.st_mtime_ns, status.st_size, entry))
        excess = sum(size for _, _, size, _ in found) + need - self.limit_bytes
        for rank, _, size, entry in sorted(found):
            # Downloads that a killed process left behind are always deleted.
            if (rank == 0 or excess > 0) and self._delete_unused(entry):
                excess -= size

    def _entries(self) -> Iterator[Path]:
        yield from self._shards.iterdir()
        yield from self.indexes.iterdir()

    def _delete_unused(self, path: Path) -> bool:
        """Deletes a file unless it is used; returns whether the file is gone."""
        try:
            with FileIO(path, "r+") as file:  # NFS locks exclusively only what is open for writing
                free = lock(file)
                if free is None and path.suffix == ".part":
                    free = living_owner(self._lock(path.stem), beside=True) is None
                if free is not False:
                    path.unlink()
        except FileNotFoundError:
            return True
        except PermissionError:  # another user's
            return False
        return free is not False

    def _lock(self, key: str) -> Path:
        return self._locks / f"{key}.lock"

    def _space(self) -> AbstractContextManager[None]:
        """Lets one process at a time make room and take it."""
        return exclusive(self.folder / "space.lock")


def default_folder() -> Path:
    """Returns the default folder.

    It lies below the first of these that is set: `$XDG_CACHE_HOME`, a job's or node's own scratch
    space (`SCRATCH`), `~/.cache`. The last is often a network disk that all nodes share.
    """
    scratch = (os.environ.get(name) for name in SCRATCH)
    local = next((path for path in scratch if path and os.access(path, os.W_OK)), None)
    home = os.environ.get("XDG_CACHE_HOME") or local or os.path.expanduser("~/.cache")
    return Path(home) / "seer-scale" / "shards"


def default_cache() -> Cache:
    """Opens the cache in the default folder with the default limit."""
    return Cache(default_folder(), DEFAULT_LIMIT)


def mark(tag: str) -> str:
    """Returns eight hex digits for a tag, which may hold any characters."""
    return _digest(tag)[:8]


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))
