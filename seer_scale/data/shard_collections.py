"""Opens collections of tar shards: from a manifest, or by looking into every shard."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from xxhash import xxh3_64_intdigest

from seer_scale.data.addresses import is_remote, redact
from seer_scale.data.cache import Cache, mark
from seer_scale.data.image_kinds import LeftOut
from seer_scale.data.remote import stat
from seer_scale.data.server_errors import as_data_error
from seer_scale.data.shard_files import load_or_build_index, open_shard_file
from seer_scale.data.shard_index import (
    Identity,
    ShardIndex,
    index_path,
    load_index,
    pack_index,
)
from seer_scale.data.shard_manifest import Shard
from seer_scale.data.tars import TarShards
from seer_scale.errors import DataError
from seer_scale.storage.atomic import replaced_file

_REQUESTS = 8  # shards that are indexed in parallel


def open_shards(shards: Sequence[Shard], cache: Cache | None) -> TarShards:
    """Opens a collection from its manifest, without reading a shard.

    If a shard differs from the manifest, reading its images raises OSError.

    Raises:
        DataError: there are no shards; or remote shards have no cache, or are larger than its
            limit.
    """
    if not shards:
        raise DataError("the list of shards is empty")
    far = [shard for shard in shards if is_remote(shard.url)]
    if far:
        _check_room(max(far, key=lambda shard: shard.bytes), cache)
    return TarShards(shards, cache)


def index_shards(urls: Sequence[str], cache: Cache | None) -> TarShards:
    """Opens a collection without a manifest: indexes every shard, or loads its kept index.

    Raises:
        DataError: a shard is not a tar, truncated or without images, or its server fails.
        OSError: a local shard is missing or cannot be read.
    """
    local = [number for number, url in enumerate(urls) if not is_remote(url)]
    if len(local) == len(urls):
        known = {} if cache is None else _look_in_own_order(urls, cache)
        looked_at = [known.get(url) or _look_near(url, cache) for url in urls]
        indexes = dict(enumerate(index for _, index in looked_at))
        near = [shard for shard, _ in looked_at]
        return TarShards(near, cache, indexes=indexes, left_out=_left_out(near, indexes.values()))
    if local or cache is None:
        raise DataError(
            "remote shards need a cache, and a pattern cannot mix local and remote ones"
        )
    pool = ThreadPoolExecutor(_REQUESTS)
    try:
        found = list(pool.map(lambda url: _look_far(url, cache), urls))
    finally:
        pool.shutdown(cancel_futures=True)
    far = [shard for shard, _, _ in found]
    left_out = _left_out(far, [index for _, _, index in found])
    return TarShards(far, cache, tags=[tag for _, tag, _ in found], left_out=left_out)


def _left_out(shards: Sequence[Shard], indexes: Iterable[ShardIndex]) -> LeftOut:
    """Returns what is left out of several shards; names begin with the file name of the shard."""
    joined = LeftOut()
    for shard, index in zip(shards, indexes, strict=True):
        name = os.path.basename(redact(shard.url))
        joined.join(LeftOut.from_json(index.left_out.tobytes()), f"{name}/")
    return joined


def _look_in_own_order(paths: Sequence[str], cache: Cache) -> dict[str, tuple[Shard, ShardIndex]]:
    """Looks at shards in an order of this process, so that a node's processes share the work.

    Shards with a fault are left out: the caller meets them in the order of the paths.
    """
    found = {}
    for path in sorted(
        paths, key=lambda path: xxh3_64_intdigest(os.fsencode(path), seed=os.getpid())
    ):
        with suppress(OSError, DataError):
            found[path] = _look_near(path, cache)
    return found


def list_indexes(source: TarShards, folder: Path) -> list[Shard]:
    """Writes the index of every shard into a folder; returns the shards with their indexes.

    A shard whose images cannot be compared with their headers gets none.

    Raises:
        DataError: a shard cannot be read.
        OSError: the folder cannot be written.
    """
    listed = []
    for number, shard in enumerate(source.shards):
        try:
            index, listable = source.index(number)
        except OSError as error:
            raise as_data_error(shard.url, error) from error
        if listable:
            identity = Identity(shard.url, shard.bytes, str(shard.published))
            path = index_path(folder, identity)
            with replaced_file(path, writers=2) as fresh:
                fresh.write_bytes(pack_index(identity, index))
            shard = replace(shard, index=str(path))
        listed.append(shard)
    return listed


def _look_near(path: str, cache: Cache | None) -> tuple[Shard, ShardIndex]:
    file, identity = open_shard_file(path, None, "", cache)
    with file:
        index = load_or_build_index(file, identity, cache)
        modified = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
    return Shard(path, len(index.images), identity.size, modified), index


def _look_far(url: str, cache: Cache) -> tuple[Shard, str, ShardIndex]:
    """Indexes a remote shard; returns the shard, its tag and its index."""
    try:
        there = stat(url, cache.retry)
        index = load_index(cache.indexes, Identity(url, there.size, mark(there.tag)))
        if index is None:
            _check_room(Shard(url, 1, there.size, None), cache)
            file, identity = open_shard_file(url, there.size, there.tag, cache)
            with file:
                index = load_or_build_index(file, identity, cache)
    except OSError as error:
        raise as_data_error(url, error) from error
    return Shard(url, len(index.images), there.size, there.modified), there.tag, index


def _check_room(largest: Shard, cache: Cache | None) -> None:
    if cache is None:
        raise DataError(f"{redact(largest.url)} is remote: remote shards need a cache folder")
    if largest.bytes > cache.limit_bytes:
        raise DataError(
            f"shard {redact(largest.url)} has {largest.bytes} bytes, more than the"
            f" {cache.limit_bytes} of the data cache {cache.folder}: raise its limit"
        )
