"""Random access to local and remote WebDataset tar shards, as img2dataset writes them.

An image is read by one positioned read of an open file, from any process or thread. Remote shards
are read from their copy in the cache, which is downloaded with the first of their images; or image
by image, if the manifest lists their indexes and the cache asks for it (`Cache.one_by_one`).
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from typing import Any

import numpy as np

from seer_scale.data.addresses import is_remote, redact
from seer_scale.data.cache import Cache
from seer_scale.data.image_kinds import LeftOut, printable
from seer_scale.data.remote import read_range, stat
from seer_scale.data.shard_files import listed_index, load_or_build_index, open_shard_file
from seer_scale.data.shard_index import BLOCK, ShardIndex, can_be_listed, is_header_of
from seer_scale.data.shard_manifest import Shard, version_of
from seer_scale.errors import DataError

MOST_OPEN_SHARDS = 64  # operating systems allow about a thousand open files
_OPEN_COPIES = 16  # the cache cannot delete copies that are open
_FAILURE_SECONDS = 60.0  # time before a failed shard is requested again
_LONGEST_LABEL = 1024  # bytes
_FETCHERS = 16  # images that a rank asks servers for at once
STALE_INDEX = (
    "its index in the manifest is of another state of the shard: write both again with "
    "`seer-scale data index`"
)


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """A shard in use.

    Attributes:
        file: the open file or copy; None if images are read from the server one by one.
        index: the places of its images.
        listed: whether the index is a manifest's, so that images are compared with their headers.
    """

    file: FileIO | None
    index: ShardIndex
    listed: bool


class TarShards:
    """The images of several shards, numbered shard by shard.

    Args:
        shards: the shards, in the order in which their images are numbered.
        cache: keeps copies of remote shards, and indexes.
        tags: known tags of the shards; None if they were not requested.
        indexes: known indexes by shard number; missing ones are built when they are needed.

    Attributes:
        fetchers: threads that should read ahead, since a server takes long to answer; 0 if none.
        left_out: members of the shards that are not used; empty if the shards come from a manifest,
            since they are not opened before they are needed.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        cache: Cache | None,
        tags: Sequence[str] | None = None,
        indexes: dict[int, ShardIndex] | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        self.left_out = left_out or LeftOut()
        self.shards = list(shards)
        self.shard_sizes = np.array([shard.count for shard in shards], dtype=np.int64)
        self.version = version_of(self.shards)
        self._ends = np.cumsum(self.shard_sizes)
        self._cache = cache
        self._tags = tags
        self._indexes = indexes or {}
        far = any(shard.index and is_remote(shard.url) for shard in self.shards)
        self.fetchers = _FETCHERS if cache and cache.one_by_one and far else 0
        self._start()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> bytes:
        """Reads an encoded image.

        Raises:
            OSError: the image or its shard cannot be read.
        """
        shard, position = self._locate(index)
        opened = self._shard(shard)  # this reference keeps the file open
        offset, size = opened.index.images[position].tolist()
        if not opened.listed:
            return self._bytes(opened, shard, offset, size)
        data = self._bytes(opened, shard, offset - BLOCK, BLOCK + size)
        if not is_header_of(data[:BLOCK], size):
            raise OSError(errno.ESTALE, STALE_INDEX, redact(self.shards[shard].url))
        return data[BLOCK:]

    def name(self, index: int) -> str:
        """Returns `shard.tar/000123.jpg`, or `shard.tar[123]` before the shard was opened."""
        shard, position = self._locate(index)
        known = self._indexes.get(shard)
        with self._lock:
            if known is None and shard in self._opened:
                known = self._opened[shard].index
        shown = printable(redact(self.shards[shard].url))
        return f"{shown}[{position}]" if known is None else f"{shown}/{known.name(position)}"

    def index(self, shard: int) -> tuple[ShardIndex, bool]:
        """Returns the index of a shard, and whether a manifest can list it.

        Raises:
            OSError: the shard cannot be read.
        """
        opened = self._shard(shard)
        listable = opened.file is not None and can_be_listed(opened.file, opened.index)
        return opened.index, listable

    def label(self, index: int) -> int | str | None:
        """Returns the content of the sample's `.cls` member; None if it has none."""
        shard, position = self._locate(index)
        opened = self._shard(shard)
        offset, size = opened.index.labels[position].tolist()
        if not size:
            return None
        data = self._bytes(opened, shard, offset, min(size, _LONGEST_LABEL))
        text = data.decode(errors="replace").strip()
        return int(text) if text.isdecimal() else printable(text)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("shards", "shard_sizes", "version", "left_out", "fetchers")
        return {key: self.__dict__[key] for key in (*kept, "_ends", "_cache", "_tags", "_indexes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        """Creates the state that belongs to one process: locks, open files, failures."""
        self._lock = threading.Lock()
        self._gates: dict[int, threading.Lock] = {}
        self._opened: dict[int, _OpenShard] = {}  # least recently used first
        self._failures: dict[int, tuple[float, OSError]] = {}

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the shard of an image and the position in the shard."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.shard_sizes[shard])

    def _shard(self, shard: int) -> _OpenShard:
        with self._lock:
            if (opened := self._find_open(shard)) is not None:
                return opened
            gate = self._gates.setdefault(shard, threading.Lock())
        with gate:  # one thread opens the shard, the others wait
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
        most = _OPEN_COPIES if remote else MOST_OPEN_SHARDS
        alike = [key for key in self._opened if is_remote(self.shards[key].url) == remote]
        for key in alike[: max(len(alike) - most, 0)]:
            del self._opened[key]

    def _open(self, shard: int) -> _OpenShard:
        url, count, size = (getattr(self.shards[shard], key) for key in ("url", "count", "bytes"))
        known = self._indexes.get(shard)
        listed = None if known else listed_index(self.shards[shard], self._cache)
        if listed is not None and self.fetchers and is_remote(url):
            self._check_size(shard)
            return _OpenShard(None, listed, listed=True)
        file, identity = open_shard_file(
            url, size, self._tags[shard] if self._tags else "", self._cache
        )
        opened = False
        try:
            index = known or listed or load_or_build_index(file, identity, self._cache)
            if len(index.images) != count:
                raise DataError(
                    f"it holds {len(index.images)} images instead of the {count} of its manifest:"
                    " write the manifest again with `seer-scale data index`"
                )
            opened = True
            return _OpenShard(file, index, listed=index is listed)
        except DataError as error:
            raise OSError(errno.EIO, str(error), redact(url)) from error
        finally:
            if not opened:
                file.close()

    def _bytes(self, opened: _OpenShard, shard: int, offset: int, size: int) -> bytes:
        url, whole = self.shards[shard].url, self.shards[shard].bytes
        if opened.file is None:
            assert self._cache is not None
            return read_range(url, offset, offset + size, whole, self._cache.retry)
        data = os.pread(opened.file.fileno(), size, offset)
        if len(data) < size:
            raise OSError(errno.EIO, "the shard has become shorter", redact(url))
        return data

    def _check_size(self, shard: int) -> None:
        """Compares the size that a server states with the manifest's.

        Raises:
            OSError: they differ, or the server does not answer.
        """
        url, size = self.shards[shard].url, self.shards[shard].bytes
        assert self._cache is not None
        if (there := stat(url, self._cache.retry).size) != size:
            raise OSError(errno.ESTALE, f"it has {there} bytes instead of {size}", redact(url))
