"""What a source holds, shard by shard, and a manifest made of it."""

from __future__ import annotations

from collections.abc import Callable

from seer_scale.data.addresses import redact
from seer_scale.data.cache import Cache
from seer_scale.data.shard_manifest import write_shards
from seer_scale.data.sources import open_source
from seer_scale.data.tars import TarShards
from seer_scale.errors import DataError

_LONGEST_TABLE = 20  # shards; of more, the first and the last ones are shown


def index(path: str, cache: Cache | None, out: str | None, say: Callable[[str], None]) -> None:
    """Indexes a source and says what it holds.

    Args:
        path: as for `open_source`.
        cache: where the indexes are kept.
        out: a manifest that is written, `.jsonl`; publication dates are the times of the files.
        say: takes one line.

    Raises:
        DataError: the source cannot be opened, or the manifest not be written.
    """
    source = open_source(path, cache)
    if not isinstance(source, TarShards):
        if out is not None:
            raise DataError(
                f"data path {path} is a folder of images: only tar shards can be in a manifest"
            )
        say(f"1 folder, {len(source):,} images, version {source.version}")
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
        say(f"{shard.count:>10,} {shard.bytes:>16,}  {day:10}  {redact(shard.url)}")
    total = sum(shard.bytes for shard in shards)
    say(f"{len(source):>10,} {total:>16,}  {'':10}  {len(shards)} shards, version {source.version}")
    if out is not None:
        write_shards(out, shards)
        say(f"wrote {out}")
