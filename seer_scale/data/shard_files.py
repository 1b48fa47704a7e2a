"""One shard on its way to its reader: the file or its local copy, and the index that fits."""

from __future__ import annotations

import errno
import os
import stat as stat_module
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TypeVar

from seer_scale.data.addresses import is_remote, redact
from seer_scale.data.cache import Cache
from seer_scale.data.remote import read_whole
from seer_scale.data.shard_index import (
    Identity,
    ShardIndex,
    load_index,
    save_index,
    unpack_index,
)
from seer_scale.data.shard_manifest import Shard

_Made = TypeVar("_Made", ShardIndex, ShardIndex | None)


def open_shard_file(
    url: str, size: int | None, tag: str, cache: Cache | None
) -> tuple[FileIO, Identity]:
    """Opens a shard, or the local copy of a remote one; returns the file and its identity.

    Raises:
        OSError: it cannot be opened, or has another size than `size` in bytes.
    """
    if is_remote(url):
        if cache is None:
            raise OSError(errno.EINVAL, "a remote shard needs a cache", redact(url))
        copy = cache.open(url, size, tag)
        return copy.file, Identity(url, os.fstat(copy.file.fileno()).st_size, copy.mark)
    mode = os.stat(url).st_mode
    if not (stat_module.S_ISREG(mode) or stat_module.S_ISDIR(mode)):
        # Opening a pipe would wait for its writer.
        raise OSError(errno.EINVAL, "it is a pipe, socket or device", url)
    file = FileIO(url)
    status = os.fstat(file.fileno())
    if size is not None and status.st_size != size:
        file.close()
        raise OSError(errno.ESTALE, f"it has {status.st_size} bytes instead of {size}", url)
    return file, Identity(os.path.abspath(url), status.st_size, str(status.st_mtime_ns))


def load_or_build_index(file: FileIO, identity: Identity, cache: Cache | None) -> ShardIndex:
    """Returns the index of an open shard, from the cache if it is known there.

    Raises:
        DataError: see `ShardIndex.build`.
    """
    if cache is None:
        return ShardIndex.build(file, identity.url)
    return _kept(cache, identity, lambda: ShardIndex.build(file, identity.url))


def listed_index(shard: Shard, cache: Cache | None) -> ShardIndex | None:
    """Returns the index that the manifest names for a shard; None if it cannot be used."""
    if shard.index is None:
        return None
    index = None
    if not is_remote(shard.index):
        with suppress(OSError):
            index = unpack_index(Path(shard.index).read_bytes(), shard.bytes)
    elif cache is not None:
        url, identity = shard.index, Identity(shard.index, shard.bytes, "listed")
        with suppress(OSError):
            index = _kept(
                cache, identity, lambda: unpack_index(read_whole(url, cache.retry), shard.bytes)
            )
    # An index of another state of the shard, or a damaged one: the headers say what is there.
    return index if index is not None and len(index.images) == shard.count else None


def _kept(cache: Cache, identity: Identity, make: Callable[[], _Made]) -> ShardIndex | _Made:
    """Returns a kept index; otherwise one process of the node makes it, and the others wait."""
    index = load_index(cache.indexes, identity)
    if index is not None:
        return index
    with cache.alone(identity):
        index = load_index(cache.indexes, identity)
        if index is not None:
            return index
        made = make()
        if made is not None:
            save_index(cache.indexes, identity, made)
        return made
