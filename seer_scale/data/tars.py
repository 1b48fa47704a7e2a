"""WebDataset tar shards, as img2dataset writes them, read at random from near and far.

An image is one positioned read of an open file, from any process or thread. Remote shards are read
from their copy in the cache, which is made when the first of their images is wanted.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from typing import Any

import numpy as np

from seer_scale.data.addresses import is_remote, redact
from seer_scale.data.cache import Cache, mark
from seer_scale.data.remote import as_data_error, stat
from seer_scale.data.shard_index import Identity, ShardIndex, load_index, save_index
from seer_scale.data.shard_manifest import Shard, version_of
from seer_scale.errors import DataError

_OPEN_SHARDS = 64  # the operating system allows about a thousand files
_OPEN_COPIES = 16  # what is open cannot be deleted from the cache
_FAILURE_SECONDS = 60.0  # a shard that failed is not asked for again before
_REQUESTS = 8  # shards that are looked at side by side
_LONGEST_LABEL = 1024  # bytes


@dataclass(frozen=True, slots=True)
class _OpenShard:
    file: FileIO
    index: ShardIndex


class TarShards:
    """The images of several shards, shard by shard in the order they have there.

    Args:
        shards: in the order in which their images are numbered.
        cache: for copies of remote shards, and for the indexes of all.
        tags: that the shards are known to have, where they were indexed before.
        indexes: of shards by number; those that are not there are made when they are needed.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        cache: Cache | None,
        tags: Sequence[str] | None = None,
        indexes: dict[int, ShardIndex] | None = None,
    ) -> None:
        self.shards = list(shards)
        self.shard_sizes = np.array([shard.count for shard in shards], dtype=np.int64)
        self.version = version_of(self.shards)
        self._ends = np.cumsum(self.shard_sizes)
        self._cache = cache
        self._tags = tags
        self._indexes = indexes or {}
        self._start()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> bytes:
        """The encoded image; OSError where it or its shard cannot be read."""
        shard, position = self._locate(index)
        opened = self._shard(shard)  # its file stays open as long as this name holds it
        offset, size = opened.index.images[position].tolist()
        return self._bytes(opened, shard, offset, size)

    def name(self, index: int) -> str:
        """Shard and member, as `shard.tar/000123.jpg`, or `shard.tar[123]` before it was read."""
        shard, position = self._locate(index)
        known = self._indexes.get(shard)
        with self._lock:
            if known is None and shard in self._opened:
                known = self._opened[shard].index
        shown = redact(self.shards[shard].url)
        return f"{shown}[{position}]" if known is None else f"{shown}/{known.name(position)}"

    def label(self, index: int) -> int | str | None:
        """Content of the sample's `.cls` member, None where it has none."""
        shard, position = self._locate(index)
        opened = self._shard(shard)
        offset, size = opened.index.labels[position].tolist()
        if not size:
            return None
        data = self._bytes(opened, shard, offset, min(size, _LONGEST_LABEL))
        text = data.decode(errors="replace").strip()
        return int(text) if text.isdecimal() else text

    def __getstate__(self) -> dict[str, Any]:
        kept = ("shards", "shard_sizes", "version", "_ends", "_cache", "_tags", "_indexes")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        """What belongs to one process."""
        self._lock = threading.Lock()
        self._gates: dict[int, threading.Lock] = {}
        self._opened: dict[int, _OpenShard] = {}  # the last used one last
        self._failures: dict[int, tuple[float, OSError]] = {}

    def _locate(self, index: int) -> tuple[int, int]:
        """Shard and position in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.shard_sizes[shard])

    def _shard(self, shard: int) -> _OpenShard:
        with self._lock:
            if (opened := self._find_open(shard)) is not None:
                return opened
            gate = self._gates.setdefault(shard, threading.Lock())
        with gate:  # one thread opens it, the others wait
            with self._lock:
                if (opened := self._find_open(shard)) is not None:
                    return opened
            try:
                opened = self._open(shard)
            except OSError as error:
                with self._lock:
                    self._failures[shard] = (time.monotonic(), error)
                raise
            with self._lock:
                self._keep(shard, opened)
                self._gates.pop(shard, None)
            return opened

    def _find_open(self, shard: int) -> _OpenShard | None:
        if (opened := self._opened.pop(shard, None)) is not None:
            self._opened[shard] = opened
            return opened
        failed_at, error = self._failures.get(shard, (-_FAILURE_SECONDS, None))
        if error is not None and time.monotonic() - failed_at < _FAILURE_SECONDS:
            raise OSError(error.errno, error.strerror, error.filename)
        return None

    def _keep(self, shard: int, opened: _OpenShard) -> None:
        self._failures.pop(shard, None)
        self._opened[shard] = opened
        remote = is_remote(self.shards[shard].url)
        most = _OPEN_COPIES if remote else _OPEN_SHARDS
        alike = [key for key in self._opened if is_remote(self.shards[key].url) == remote]
        for key in alike[: max(len(alike) - most, 0)]:
            del self._opened[key]

    def _open(self, shard: int) -> _OpenShard:
        url, count, size = (getattr(self.shards[shard], key) for key in ("url", "count", "bytes"))
        file, identity = _open_file(url, size, self._tags[shard] if self._tags else "", self._cache)
        index = self._indexes.get(shard)
        if index is None:
            try:
                index = _index(file, identity, self._cache)
            except DataError as error:
                raise OSError(errno.EIO, str(error), redact(url)) from error
        if len(index.images) != count:
            raise OSError(
                errno.EIO,
                f"it holds {len(index.images)} images instead of the {count} of its manifest",
                redact(url),
            )
        return _OpenShard(file, index)

    def _bytes(self, opened: _OpenShard, shard: int, offset: int, size: int) -> bytes:
        data = os.pread(opened.file.fileno(), size, offset)
        if len(data) < size:
            raise OSError(errno.EIO, "the shard has become shorter", redact(self.shards[shard].url))
        return data


def open_shards(shards: Sequence[Shard], cache: Cache | None) -> TarShards:
    """A collection whose manifest tells what is in it; touches no shard.

    A shard that turns out to be something else fails when its images are read, with OSError.

    Raises:
        DataError: there are no shards, remote ones without a cache, or larger ones than it takes.
    """
    if not shards:
        raise DataError("the list of shards is empty")
    far = [shard for shard in shards if is_remote(shard.url)]
    if far:
        _check_room(max(far, key=lambda shard: shard.bytes), cache)
    return TarShards(shards, cache)


def index_shards(urls: Sequence[str], cache: Cache | None) -> TarShards:
    """A collection without manifest: every shard is looked at, those seen before by stamp alone.

    Raises:
        DataError: a shard that is no tar, truncated, without images, or on a failing server.
        OSError: a local shard that is missing or cannot be read.
    """
    local = [number for number, url in enumerate(urls) if not is_remote(url)]
    if len(local) == len(urls):
        looked_at = [_look_near(url, cache) for url in urls]
        indexes = dict(enumerate(index for _, index in looked_at))
        return TarShards([shard for shard, _ in looked_at], cache, indexes=indexes)
    if local or cache is None:
        raise DataError("remote shards need a cache, and a pattern names only local or remote ones")
    pool = ThreadPoolExecutor(_REQUESTS)
    try:
        found = list(pool.map(lambda url: _look_far(url, cache), urls))
    finally:
        pool.shutdown(cancel_futures=True)
    return TarShards([shard for shard, _ in found], cache, tags=[tag for _, tag in found])


def _look_near(path: str, cache: Cache | None) -> tuple[Shard, ShardIndex]:
    file, identity = _open_file(path, None, "", cache)
    with file:
        index = _index(file, identity, cache)
        modified = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
    return Shard(path, len(index.images), identity.size, modified), index


def _look_far(url: str, cache: Cache) -> tuple[Shard, str]:
    """The shard with its tag."""
    try:
        there = stat(url, cache.retry)
        index = load_index(cache.indexes, Identity(url, there.size, mark(there.tag)))
        if index is None:
            _check_room(Shard(url, 1, there.size, None), cache)
            file, identity = _open_file(url, there.size, there.tag, cache)
            with file:
                index = _index(file, identity, cache)
    except OSError as error:
        raise as_data_error(url, error) from error
    return Shard(url, len(index.images), there.size, there.modified), there.tag


def _open_file(
    url: str, size: int | None, tag: str, cache: Cache | None
) -> tuple[FileIO, Identity]:
    """A shard or its local copy, and what it is."""
    if is_remote(url):
        if cache is None:
            raise OSError(errno.EINVAL, "a remote shard needs a cache", redact(url))
        copy = cache.open(url, size, tag)
        return copy.file, Identity(url, os.fstat(copy.file.fileno()).st_size, copy.mark)
    file = FileIO(url)
    status = os.fstat(file.fileno())
    if size is not None and status.st_size != size:
        raise OSError(errno.ESTALE, f"it has {status.st_size} bytes instead of {size}", url)
    return file, Identity(os.path.abspath(url), status.st_size, str(status.st_mtime_ns))


def _index(file: FileIO, identity: Identity, cache: Cache | None) -> ShardIndex:
    index = load_index(cache.indexes, identity) if cache else None
    if index is None:
        index = ShardIndex.build(file, identity.url)
        if cache:
            save_index(cache.indexes, identity, index)
    return index


def _check_room(largest: Shard, cache: Cache | None) -> None:
    if cache is None:
        raise DataError(f"{redact(largest.url)} is remote: remote shards need a cache folder")
    if largest.bytes > cache.limit_bytes:
        raise DataError(
            f"shard {redact(largest.url)} has {largest.bytes} bytes, more than the"
            f" {cache.limit_bytes} of the data cache {cache.folder}: raise its limit"
        )
