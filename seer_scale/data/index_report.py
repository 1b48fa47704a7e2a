"""The report of `seer-scale data index`: the shards of a collection, and their manifest."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from seer_scale.data.addresses import redact
from seer_scale.data.cache import Cache
from seer_scale.data.image_kinds import printable
from seer_scale.data.shard_collections import list_indexes
from seer_scale.data.shard_manifest import write_shards
from seer_scale.data.sources import Source, open_source
from seer_scale.data.tars import TarShards
from seer_scale.errors import DataError
from seer_scale.storage.ownership import owned

_LONGEST_TABLE = 20  # shards; of a longer list, the first and the last ones are shown


def index(path: str, cache: Cache | None, out: str | None, say: Callable[[str], None]) -> None:
    """Indexes a source and reports its shards.

    Args:
        path: path or address for `open_source`.
        cache: keeps the indexes; None if there is no cache.
        out: file of a manifest to write, `.jsonl`; publication dates are the times of the shards.
        say: takes one line of the report.

    Raises:
        DataError: the source cannot be opened, or the manifest cannot be written.
        UserError: another process writes the manifest.
    """
    there = out is not None and Path(out).parent.is_dir()
    with owned(Path(out), f"--out {out}", beside=True) if out and there else nullcontext():
        _index(path, cache, out, say)


def _index(path: str, cache: Cache | None, out: str | None, say: Callable[[str], None]) -> None:
    source = open_source(path, cache)
    if not isinstance(source, TarShards):
        if out is not None:
            raise DataError(
                f"data path {path} is a folder of images: only tar shards can be in a manifest"
            )
        say(f"1 folder, {len(source):,} images, version {source.version}")
        _say_left_out(source, say)
        return
    shards = source.shards
    say(f"{'images':>10} {'bytes':>16}  {'published':10}  shard")
    for number, shard in enumerate(shards):
        if len(shards) > _LONGEST_TABLE and number >= _LONGEST_TABLE // 2:
            if number == _LONGEST_TABLE // 2:
                say(f"{'...':>10} {'...':>16}")
            if number < len(shards) - _LONGEST_TABLE // 2:
                continue
        day = f"{shard.published:%Y-%m-%d}" if shard.published else "unknown"
        say(f"{shard.count:>10,} {shard.bytes:>16,}  {day:10}  {printable(redact(shard.url))}")
    total = sum(shard.bytes for shard in shards)
    say(f"{len(source):>10,} {total:>16,}  {'':10}  {len(shards)} shards, version {source.version}")
    _say_left_out(source, say)
    if out is not None:
        folder = Path(os.path.abspath(out)).with_suffix(".index")
        try:
            if Path(out).parent.is_dir():  # a mistyped folder is not made
                shards = list_indexes(source, folder)
        except OSError as error:
            raise DataError(
                f"the indexes {folder} cannot be written ({error.strerror or error}): name another "
                "file as --out"
            ) from error
        write_shards(out, shards)
        listed = sum(shard.index is not None for shard in shards)
        say(f"wrote {out}, and the indexes of {listed} shards into {folder.name}/ beside it")


def _say_left_out(source: Source, say: Callable[[str], None]) -> None:
    for line in source.left_out.lines():
        say(line)
