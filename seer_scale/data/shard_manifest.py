"""A manifest: the list of a collection's shards and their image counts, as JSON lines or Parquet.

    {"url":"shard-000000.tar","count":10000,"bytes":104857600,"published":"2024-05-01T00:00:00+00:00"}

A collection of any size opens from its manifest alone, without reading its shards.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from seer_scale.data.addresses import is_remote, protocol_of, redact
from seer_scale.data.remote import Retry, read_whole
from seer_scale.data.server_errors import as_data_error
from seer_scale.errors import DataError
from seer_scale.storage.atomic import replaced_file

MANIFEST_SUFFIXES = (".jsonl", ".parquet")

_REQUIRED = ("url", "count", "bytes")
_LOCAL_PROTOCOLS = frozenset({"file", "local", "memory"})
_MOST_BYTES = 1 << 50  # largest shard
_MOST_IMAGES = 1 << 53  # largest collection; float64 holds such numbers exactly
_HEADER_BYTES = 512  # header of each image in a tar


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a collection.

    Attributes:
        url: path or address of the shard.
        count: number of images.
        bytes: size in bytes.
        published: time of publication, with time zone; None if unknown.
        index: path or address of the shard's index, if one was written; see `shard_index`.
    """

    url: str
    count: int
    bytes: int
    published: datetime | None
    index: str | None = None


def is_manifest(path: str) -> bool:
    """Returns whether a data path is a manifest, by its suffix."""
    return path.partition("?")[0].lower().endswith(MANIFEST_SUFFIXES)


def read_shards(path: str, retry: Retry | None = None) -> list[Shard]:
    """Reads a local or remote manifest; relative urls start at the manifest's folder.

    Raises:
        DataError: the manifest cannot be read, or a row is wrong; the sentence names file, row and
            column.
    """
    shown = redact(path)
    try:
        data = read_whole(path, retry or Retry()) if is_remote(path) else Path(path).read_bytes()
    except OSError as error:
        if is_remote(path):
            raise as_data_error(path, error) from error
        raise DataError(f"manifest {shown} cannot be read: {error.strerror or error}") from error
    is_parquet = path.partition("?")[0].lower().endswith(".parquet")
    rows = _parquet_rows(data, shown) if is_parquet else _json_rows(data, shown)
    base = path.partition("?")[0].rpartition("/")[0] if is_remote(path) else _folder(path)
    shards: list[Shard] = []
    first_rows: dict[str, int] = {}
    for number, row in rows:
        shard = _parse(row, base, shown, number)
        if first_rows.setdefault(shard.url, number) != number:
            _fail(shown, number, "url", f"is the same as in row {first_rows[shard.url]}")
        shards.append(shard)
    if not shards:
        raise DataError(f"manifest {shown} names no shards")
    if sum(shard.count for shard in shards) > _MOST_IMAGES:
        raise DataError(f"manifest {shown} names more images than can be numbered")
    return shards


def write_shards(path: str, shards: Iterable[Shard]) -> None:
    """Writes a manifest as JSON lines; shards below the manifest's folder get relative urls.

    Raises:
        DataError: the path is remote, does not end in .jsonl, or cannot be written.
    """
    if is_remote(path) or not path.lower().endswith(".jsonl"):
        raise DataError(f"manifest {redact(path)} cannot be written: give a local path with .jsonl")
    base = _folder(path) + "/"
    lines = []
    for shard in shards:
        row = {
            "url": shard.url.removeprefix(base),
            "count": shard.count,
            "bytes": shard.bytes,
            "published": shard.published.astimezone(UTC).isoformat() if shard.published else None,
            **({"index": shard.index.removeprefix(base)} if shard.index else {}),
        }
        lines.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    try:
        Path(path).parent.stat()  # a mistyped folder is not made
        with replaced_file(Path(path), writers=2) as fresh:
            fresh.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"manifest {path} cannot be written: {error.strerror or error}") from error


def version_of(shards: Sequence[Shard]) -> str:
    """Returns 16 hex digits that change with the names, counts or order of the shards.

    The folder that all shards share does not count, so that a collection may be moved. Signatures
    in addresses do not count either.
    """
    names = [redact(shard.url) for shard in shards]
    folders = {name[: name.rfind("/") + 1] for name in names}
    shared = min(folders, default="")
    while not all(folder.startswith(shared) for folder in folders):
        shared = shared[: shared[:-1].rfind("/") + 1]
    start = len(shared)
    digest = xxhash.xxh3_64()
    for name, shard in zip(names, shards, strict=True):
        digest.update(f"{name[start:]}\0{shard.count}\0".encode("utf-8", "surrogateescape"))
    return str(digest.hexdigest())


def drop_old(shards: Sequence[Shard], now: datetime, max_age_days: float) -> list[Shard]:
    """Returns the shards published at most `max_age_days` before `now`, and those without a date.

    `now` has a time zone.
    """
    oldest = now - timedelta(days=max_age_days)
    return [shard for shard in shards if shard.published is None or shard.published >= oldest]


def _folder(path: str) -> str:
    return os.path.dirname(os.path.abspath(path)).rstrip("/")


def _json_rows(data: bytes, shown: str) -> Iterator[tuple[int, dict[str, Any]]]:
    decode = json.JSONDecoder(object_pairs_hook=_without_doubles).decode
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"manifest {shown} is not UTF-8 text: {error.reason}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        try:
            row = decode(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"manifest {shown}, row {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(
                f"manifest {shown}, row {number} is not an object: each line has to be an object"
                f" with {', '.join(_REQUIRED)}"
            )
        yield number, row


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key is given twice")
    return row


def _parquet_rows(data: bytes, shown: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        known = [
            name for name in (*_REQUIRED, "published", "index") if name in file.schema_arrow.names
        ]
        table = file.read(columns=known)
        if "published" in known:
            place = table.schema.get_field_index("published")
            kind = table.schema.field(place).type
            if pa.types.is_timestamp(kind):  # Python has no nanoseconds
                times = table.column(place).cast(pa.timestamp("us", kind.tz), safe=False)
                table = table.set_column(place, "published", times)
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        cause = " ".join(str(error).split())[:200]
        raise DataError(f"manifest {shown} is not a readable Parquet file: {cause}") from error
    yield from enumerate(rows, start=1)


def _parse(row: dict[str, Any], base: str, shown: str, number: int) -> Shard:
    for column in _REQUIRED:
        if column not in row:
            _fail(shown, number, column, "is missing: a row has url, count and bytes")
    size = _integer(row, "bytes", _MOST_BYTES, shown, number)
    count = _integer(row, "count", _MOST_BYTES, shown, number)
    if count * _HEADER_BYTES > size:
        _fail(shown, number, "count", f"is {count}: more than a tar of {size} bytes can hold")
    url = _url(row["url"], base, shown, number)
    index = _url(row["index"], base, shown, number, "index") if row.get("index") else None
    return Shard(url, count, size, _time(row.get("published"), shown, number), index)


def _integer(row: dict[str, Any], column: str, most: int, shown: str, number: int) -> int:
    value = row[column]
    if type(value) is not int:
        _fail(shown, number, column, f"is {value!r:.40}: it has to be an integer")
    if not 0 < value <= most:
        _fail(shown, number, column, f"is {value!r:.40}: it has to be from 1 to {most}")
    return value


def _url(value: object, base: str, shown: str, number: int, column: str = "url") -> str:
    if not isinstance(value, str) or not value:
        _fail(shown, number, column, f"is {value!r:.40}: it has to be a path or an address")
    if not value.isprintable():
        _fail(shown, number, column, f"is {redact(value)!r:.60}: it holds control characters")
    protocol = protocol_of(value)
    if protocol in _LOCAL_PROTOCOLS or "::" in protocol or value.lower().startswith("file:"):
        _fail(
            shown,
            number,
            column,
            f"is {redact(value):.80}: give a path, http://, https:// or s3://",
        )
    if protocol:
        return value
    if value.startswith("/"):
        if is_remote(base):
            _fail(shown, number, column, f"is {value:.60}: a remote manifest names no local files")
        return value
    return _without_dots(f"{base}/{value}") if ".." in value else f"{base}/{value}"


def _without_dots(url: str) -> str:
    """Resolves `..` as a file system does, but never leaves the host or bucket."""
    if not is_remote(url):
        return os.path.normpath(url)
    protocol, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    return f"{protocol}://{host}{posixpath.normpath('/' + path)}"


def _time(value: object, shown: str, number: int) -> datetime | None:
    if value is None:
        return None
    given = value
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    return _fail(shown, number, "published", f"is {given!r:.40}: it has to be an ISO date")


def _fail(shown: str, number: int, column: str, fault: str) -> NoReturn:
    raise DataError(f"manifest {shown}, row {number}, column {column} {fault}")
