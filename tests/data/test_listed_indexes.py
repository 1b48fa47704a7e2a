"""Indexes beside the manifest, and once per node: no rank walks through headers for itself."""

from __future__ import annotations

import json
import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from harness.jobs import ROOT
from harness.node_bytes import measure, write_collection
from seer_scale.config import RunConfig
from seer_scale.config.recipe import parse
from seer_scale.data import shard_index, tar_members
from seer_scale.data.cache import Cache
from seer_scale.data.index_report import index
from seer_scale.data.shard_index import ShardIndex
from seer_scale.data.sources import open_source
from seer_scale.data.tars import TarShards
from seer_scale.errors import DataError
from seer_scale.train.build_images import cache_of
from tests.data.servers import FileServer
from tests.data.test_sources import shard

IMAGES = 40


def configuration(*more: str) -> RunConfig:
    argv = ["--recipe", "swav_in1k_regnety_16gf", "run.dir=unused", *more]
    return parse(argv, recipes=ROOT / "launch" / "recipes", ranks=1).config


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    write_collection(tmp_path / "far", shards=3, images=IMAGES, size=3000)
    return tmp_path / "far"


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards whose headers this process walks through."""
    seen: list[str] = []
    read = tar_members.read_members

    def counted(shown: str, file: Any) -> Any:
        seen.append(shown)
        return read(shown, file)

    monkeypatch.setattr(shard_index, "read_members", counted)
    return seen


def test_a_listed_index_saves_the_walk(collection: Path, walks: list[str]) -> None:
    manifest = collection / "shards.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert all((collection / row["index"]).is_file() for row in rows)
    assert {row["index"].split("/")[0] for row in rows} == {"shards.index"}
    listed = open_source(manifest)
    plain = open_source(f"{collection}/*.tar")
    walks.clear()
    images = [listed.read(number) for number in range(len(listed))]
    assert walks == []
    assert images == [plain.read(number) for number in range(len(plain))]
    assert [listed.name(n) for n in (0, 50)] == [plain.name(n) for n in (0, 50)]
    assert listed.version == plain.version  # so the order of samples is what it was


def test_a_shard_that_is_gone_is_not_blamed_on_the_folder_of_indexes(collection: Path) -> None:
    gone = collection / "0001.tar"
    gone.unlink()
    with pytest.raises(DataError, match=f"{gone} cannot be read: No such file"):
        index(str(collection / "shards.jsonl"), None, str(collection / "new.jsonl"), print)


@pytest.mark.parametrize("damage", ["missing", "cut off", "of another shard"])
def test_without_its_listed_index_a_shard_is_walked(
    collection: Path, walks: list[str], damage: str
) -> None:
    manifest = collection / "shards.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    path = collection / rows[1]["index"]
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        rows[1]["index"] = rows[1]["index"].replace("shards.index", "other.index")
        shard(collection / "few.tar", 0, 2)
        index(str(collection / "few.tar"), None, str(collection / "other.jsonl"), print)
        (collection / "other.index").rename(collection / "gone")
        (collection / "other.index").mkdir()
        (few,) = (collection / "gone").iterdir()
        few.rename(collection / rows[1]["index"])
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = open_source(manifest)
    plain = open_source(f"{collection}/0*.tar")
    walks.clear()
    assert [listed.read(n) for n in range(len(listed))] == [plain.read(n) for n in range(120)]
    assert len(walks) == 1


def test_an_index_of_another_state_of_the_shard_is_refused(collection: Path) -> None:
    """A shard of the same size and count, whose members have other lengths."""
    path = collection / "0001.tar"
    data = bytearray(path.read_bytes())
    data[512 + 3072 + 100 : 512 + 3072 + 200] = bytes(100)  # the second header loses its numbers
    path.write_bytes(bytes(data))
    source = open_source(collection / "shards.jsonl")
    assert len(source.read(IMAGES)) == 3000
    with pytest.raises(OSError, match="index in the manifest is of another state of the shard"):
        source.read(IMAGES + 1)


def build_slowly(folder: str, cache: str, marks: str) -> None:
    build = ShardIndex.build

    def noted(file: Any, url: str) -> ShardIndex:
        (Path(marks) / f"{os.path.basename(url)}-{os.getpid()}").touch()
        return build(file, url)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardIndex, "build", noted)
        source = open_source(f"{folder}/*.tar", Cache(Path(cache), 1 << 30))
        assert len(source) == 3 * IMAGES


@pytest.mark.long
def test_processes_of_a_node_walk_through_each_shard_once(collection: Path, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    case = (str(collection), str(tmp_path / "cache"), str(tmp_path / "marks"))
    with get_context("spawn").Pool(4) as pool:
        pool.starmap(build_slowly, [case] * 8)
    built = [path.name.split("-")[0] for path in (tmp_path / "marks").iterdir()]
    assert sorted(built) == ["0000.tar", "0001.tar", "0002.tar"]


def test_a_node_takes_its_share_of_the_images(collection: Path, tmp_path: Path) -> None:
    server = FileServer(collection)
    whole = sum(path.stat().st_size for path in collection.glob("*.tar"))
    beside = sum(path.stat().st_size for path in collection.rglob("*") if path.is_file()) - whole
    try:
        _, expected = measure(server, tmp_path, 1, "copies")
        for nodes, how in ((1, "images"), (3, "images"), (3, "copies")):
            row, found = measure(server, tmp_path, nodes, how)
            assert found == expected  # the same images at the same positions
            share = whole / nodes if how == "images" else whole
            assert share * 0.8 < row.bytes < share + beside + 1000
    finally:
        server.stop()


def test_several_nodes_read_images_and_one_node_copies(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the configuration to the source: `data.remote`, and the launcher's environment."""
    far = "http://127.0.0.1:1/shards.jsonl"
    cases = [
        ("auto", "8", "8", False), ("auto", "16", "8", True),
        ("copies", "16", "8", False), ("images", "8", "8", True),
    ]  # fmt: skip
    for how, world, local, expected in cases:
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        config = configuration(
            f"data.path={far}", f"data.cache_dir={tmp_path}", f"data.remote={how}"
        )
        cache = cache_of(config)
        assert cache is not None
        assert cache.one_by_one == expected, (how, world)
    near = configuration(f"data.path={collection}", "data.cache_dir=null")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_of(near) is not None  # keeps the indexes of local shards
    (tmp_path / "home").rename(tmp_path / "gone")
    (tmp_path / "home").touch()
    assert cache_of(near) is None  # a cache that cannot be written costs time, not the run
    (tmp_path / "images").mkdir()
    assert cache_of(configuration(f"data.path={tmp_path / 'images'}")) is None


def test_only_shards_far_away_are_read_ahead(collection: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30, one_by_one=True)
    near = open_source(collection / "shards.jsonl", cache)
    assert isinstance(near, TarShards)
    assert near.fetchers == 0
