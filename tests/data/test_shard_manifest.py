"""Manifests are read, written and checked row by row; a billion images open at once."""

from __future__ import annotations

import json
import pickle
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seer_scale.data.cache import Cache
from seer_scale.data.shard_collections import open_shards
from seer_scale.data.shard_manifest import Shard, drop_old, read_shards, version_of, write_shards
from seer_scale.data.sources import open_source
from seer_scale.errors import DataError
from tests.data.test_sources import shard

MAY = datetime(2024, 5, 1, tzinfo=UTC)
GOOD = {"url": "a.tar", "count": 2, "bytes": 10240, "published": "2024-05-01"}


def write_rows(path: Any, *rows: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    shards = [
        Shard(f"{tmp_path}/x/a.tar", 3, 10240, MAY),
        Shard("s3://bucket/b.tar", 1, 1 << 40, None),
        Shard("https://host/c.tar?signature=1", 7, 5000, MAY + timedelta(hours=1)),
        Shard("/elsewhere/ü.tar", 2, 1024, None),
    ]
    path = tmp_path / "m.jsonl"
    write_shards(str(path), shards)
    assert read_shards(str(path)) == shards
    assert path.read_text().splitlines()[0] == (
        '{"url":"x/a.tar","count":3,"bytes":10240,"published":"2024-05-01T00:00:00+00:00"}'
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.jsonl"]


def test_a_manifest_that_begins_with_the_mark_of_its_encoding(tmp_path: Path) -> None:
    path = tmp_path / "shards.jsonl"
    path.write_text('{"url": "a.tar", "count": 3, "bytes": 4096}\n', encoding="utf-8-sig")
    assert [shard.count for shard in read_shards(str(path))] == [3]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["2024-05-01", None], pa.string()),
        (["2024-05-01T02:00:00+02:00", None], pa.string()),
        ([date(2024, 5, 1), None], pa.date32()),
        ([MAY, None], pa.timestamp("ns", "UTC")),
        ([MAY.replace(tzinfo=None), None], pa.timestamp("s")),
    ],
)
def test_parquet_with_dates_of_every_kind(tmp_path: Path, values: Any, kind: Any) -> None:
    columns = {
        "url": ["a.tar", "s3://b/c.tar"],
        "count": pa.array([2, 3], pa.int32()),
        "bytes": [4096, 8192],
        "published": pa.array(values, kind),
        "more": [1, 2],
    }
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    assert read_shards(str(tmp_path / "m.parquet")) == [
        Shard(f"{tmp_path}/a.tar", 2, 4096, MAY),
        Shard("s3://b/c.tar", 3, 8192, None),
    ]


def test_paths_are_relative_to_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lists").mkdir()
    first, second = ({**GOOD, "url": url} for url in ("../a.tar", "/data/b.tar"))
    write_rows(tmp_path / "lists/m.jsonl", first, second)
    monkeypatch.chdir(tmp_path / "lists")
    expected = [f"{tmp_path}/a.tar", "/data/b.tar"]
    assert [shard.url for shard in read_shards("m.jsonl")] == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"url": None}, "row 2, column url is None: it has to be a path"),
        ({"url": 5}, "row 2, column url is 5: it has to be a path"),
        ({"url": ""}, "row 2, column url is '': it has to be"),
        ({"url": "a\0b.tar"}, r"row 2, column url is 'a\\x00b.tar': it holds control"),
        ({"url": "a\nb.tar"}, "it holds control characters"),
        ({"url": "file:///etc/passwd"}, "column url is file:///etc/passwd: give a path"),
        ({"url": "FILE:/etc/passwd"}, "column url is FILE:/etc/passwd: give a path"),
        ({"url": "simplecache::file:///etc/passwd"}, "column url is simplecache::file"),
        ({"url": "memory://x"}, "column url is memory://x: give a path"),
        ({"url": "first.tar"}, "row 2, column url is the same as in row 1"),
        ({"url": "x/../first.tar"}, "row 2, column url is the same as in row 1"),
        ({"count": -1}, "row 2, column count is -1: it has to be from 1 to"),
        ({"count": 0}, "row 2, column count is 0: it has to be from 1 to"),
        ({"count": 2.0}, "row 2, column count is 2.0: it has to be an integer"),
        ({"count": float("nan")}, "row 2, column count is nan: it has to be an integer"),
        ({"count": float("inf")}, "row 2, column count is inf: it has to be an integer"),
        ({"count": True}, "row 2, column count is True: it has to be an integer"),
        ({"count": "2"}, "row 2, column count is '2': it has to be an integer"),
        ({"count": 10**18}, "row 2, column count is 1000000000000000000: it has to be from"),
        ({"count": 10**4200}, r"row 2, column count is 10+: it has to be from"),
        ({"count": 10**6}, "row 2, column count is 1000000: more than a tar of 10240 bytes can"),
        ({"bytes": -5}, "row 2, column bytes is -5"),
        ({"bytes": None}, "row 2, column bytes is None"),
        ({"bytes": [1]}, r"row 2, column bytes is \[1\]"),
        (
            {"published": "yesterday"},
            "row 2, column published is 'yesterday': it has to be an",
        ),
        ({"published": 5}, "row 2, column published is 5"),
        ({"published": "0001-01-01T00:00:00+14:00"}, "row 2, column published is '0001"),
        ({"published": {}}, "row 2, column published is {}"),
    ],
)
def test_each_hostile_value_has_its_sentence(tmp_path: Path, change: Any, sentence: Any) -> None:
    path = write_rows(tmp_path / "m.jsonl", {**GOOD, "url": "first.tar"}, {**GOOD, **change})
    with pytest.raises(DataError, match=sentence) as caught:
        open_source(path)
    assert str(caught.value).startswith(f"manifest {path}, row 2, column ")
    assert len(str(caught.value)) < 300 + len(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["url", "count", "bytes"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_missing_columns(tmp_path: Path, column: Any, suffix: Any) -> None:
    row = {key: value for key, value in GOOD.items() if key != column}
    path = tmp_path / f"m{suffix}"
    if suffix == ".jsonl":
        write_rows(path, row)
    else:
        pq.write_table(pa.table({key: [value] for key, value in row.items()}), path)
    with pytest.raises(DataError, match=f"row 1, column {column} is missing: a row has url, count"):
        open_source(path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("m.jsonl", b"", "names no shards"),
        ("m.jsonl", b"\n \n", "names no shards"),
        ("m.jsonl", b"{", "row 1 is not JSON"),
        ("m.jsonl", b"\n[1]", "row 2 is not an object: each line has to be an object"),
        ("m.jsonl", b"[" * 100_000, "row 1 is not JSON"),
        ("m.jsonl", b"\xff\xfe{}", "is not UTF-8 text"),
        ("m.jsonl", b"9" * 5000, "row 1 is not JSON"),
        ("m.parquet", b"", "is not a readable Parquet file"),
        ("m.parquet", b"PAR1 and nothing more PAR1", "is not a readable Parquet file"),
    ],
)
def test_each_damaged_file_has_its_sentence(
    tmp_path: Path, name: Any, content: Any, sentence: Any
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.* {sentence}") as caught:
        open_source(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"m\.jsonl cannot be read: No such file"):
        open_source(tmp_path / "m.jsonl")


@pytest.mark.parametrize("path", ["m.csv", "s3://bucket/m.jsonl"])
def test_manifests_are_written_where_they_can_be(path: Any) -> None:
    with pytest.raises(DataError, match="cannot be written: give a local path with"):
        write_shards(path, [])


def test_old_shards_are_dropped() -> None:
    shards = [Shard(str(age), 1, 512, MAY - timedelta(days=age)) for age in range(5)]
    shards.append(Shard("undated", 1, 512, None))
    assert [s.url for s in drop_old(shards, MAY, 2)] == ["0", "1", "2", "undated"]
    assert drop_old(shards, MAY, 0.5)[0].url == "0"
    assert len(drop_old(shards, MAY, 1.5)) == 3


def test_versions() -> None:
    a, b = Shard("s3://x/y/a.tar", 1, 512, None), Shard("s3://x/z/b.tar", 2, 1024, MAY)
    version = version_of([a, b])
    assert len(bytes.fromhex(version)) == 8
    moved = [Shard("/d/y/a.tar", 1, 512, None), Shard("/d/z/b.tar", 2, 1024, None)]
    assert version_of(moved) == version
    signed = [Shard(f"https://u:p@h/{x}.tar?sig={x}", 1, 512, None) for x in "ab"]
    plain = [Shard(f"https://h/{x}.tar?sig=new", 1, 512, None) for x in "ab"]
    assert version_of(signed) == version_of(plain)
    others = [[b, a], [a], [a, Shard(b.url, 3, 1024, MAY)], [a, Shard("s3://x/z/c.tar", 2, 9, MAY)]]
    assert len({version_of(shards) for shards in [[a, b], *others]}) == 5
    assert version_of([Shard("a.tar", 1, 512, None)]) == version_of([Shard("/a.tar", 1, 9, None)])


def test_a_shard_unlike_its_manifest_fails_image_by_image(tmp_path: Path) -> None:
    size = shard(tmp_path / "good.tar", 0, 3).stat().st_size
    (tmp_path / "text.tar").write_text("no tar " * 2000)
    rows = [
        {"url": "good.tar", "count": 3, "bytes": size},
        {"url": "../" + tmp_path.name + "/good.tar?", "count": 3, "bytes": size},
        {"url": "text.tar", "count": 2, "bytes": 14000},
        {"url": "short.tar", "count": 4, "bytes": size},
        {"url": "long.tar", "count": 3, "bytes": size + 512},
        {"url": "more.tar", "count": 2, "bytes": size},
    ]
    shard(tmp_path / "more.tar", 0, 3)
    shard(tmp_path / "short.tar", 0, 3)
    shard(tmp_path / "long.tar", 0, 3)
    source = open_source(write_rows(tmp_path / "m.jsonl", *rows))
    assert source.shard_sizes.tolist() == [3, 3, 2, 4, 3, 2]
    assert source.read(2) == b"image 2" * 101
    for index, cause in [
        (3, "No such file"),
        (6, "neither an image folder nor a tar shard"),
        (8, "holds 3 images instead of the 4 of its manifest"),
        (14, f"has {size} bytes instead of {size + 512}"),
        (15, "holds 3 images instead of the 2 of its manifest"),
    ]:
        for _ in range(2):  # the second time from memory
            with pytest.raises(OSError, match=cause) as caught:
                source.read(index)
            assert cause in str(caught.value.strerror)


def test_a_billion_images_open_at_once(tmp_path: Path) -> None:
    count = 100_000
    path = tmp_path / "m.jsonl"
    write_shards(
        str(path), [Shard(f"s3://b/{n:06}.tar", 10_000, 1 << 30, MAY) for n in range(count)]
    )
    cache = Cache(tmp_path / "cache", 1 << 40)
    shards = read_shards(str(path))
    start = time.perf_counter()
    source = open_shards(shards, cache)
    seconds = time.perf_counter() - start
    assert len(source) == 10**9
    assert source.name(10**9 - 1) == "s3://b/099999.tar[9999]"
    assert seconds < 2  # 0.3 on an idle machine
    assert len(pickle.dumps(source)) < 20e6


@pytest.mark.parametrize(
    ("shards", "sentence"),
    [
        ([], "the list of shards is empty"),
        ([Shard("s3://b/a.tar", 1, 1 << 20, None)], "a.tar has 1048576 bytes, more than the 1024"),
    ],
)
def test_lists_that_cannot_be_opened(tmp_path: Path, shards: Any, sentence: Any) -> None:
    with pytest.raises(DataError, match=sentence):
        open_shards(shards, Cache(tmp_path, 1024))
    with pytest.raises(DataError, match=r"is empty|s3://b/a.tar is remote: .* need a cache"):
        open_shards(shards, None)
