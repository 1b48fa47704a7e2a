"""Tiles of photographs: reproducible, complete or absent, and training sees no query."""

from __future__ import annotations

import json
import multiprocessing
import tarfile
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pytest

from seer_scale.data.decode import decode
from seer_scale.data.generate import tiles as tiles_module
from seer_scale.data.generate.tiles import PHOTOGRAPHS, load_photographs, regions, write_tiles
from seer_scale.data.sources import open_source
from seer_scale.errors import DataError
from tests.checkpoint.test_saving import largest_file

FEW = {"train_per_photograph": 3, "bank_per_photograph": 2, "queries_per_photograph": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tiles(tmp_path_factory.mktemp("demo") / "tiles", **FEW)


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with largest_file(4096), pytest.raises(DataError, match=r"tiles cannot be written to .*demo: "):
        write_tiles(tmp_path / "demo", **FEW)
    assert list(tmp_path.iterdir()) == []


def contents(folder: Any) -> Any:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def boxes(folder: Any) -> Any:
    """`(label, box)` of every tile, as its JSON member tells."""
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {m.name: cast(IO[bytes], tar.extractfile(m)).read() for m in tar}
        for name, content in members.items():
            if name.endswith(".json"):
                about = json.loads(content)
                label = int(members[name.replace(".json", ".cls")])
                assert about["photograph"] == PHOTOGRAPHS[label][1]
                found.append((label, about["box"]))
    return found


def test_each_set_is_a_labelled_source_of_all_photographs(written: Any) -> None:
    for path, each in ((written.train, 3), (written.knn_train, 2), (written.knn_test, 2)):
        source = open_source(path)
        labels: list[Any] = [source.label(i) for i in range(len(source))]
        assert np.bincount(labels).tolist() == [each] * len(PHOTOGRAPHS)
        assert all(decode(source.read(i)).size == (96, 96) for i in range(len(source)))


def test_training_and_query_tiles_share_no_pixel(written: Any) -> None:
    photographs = load_photographs()
    seen = [np.zeros((p.height, p.width), dtype=bool) for p in photographs]
    for folder in (written.train, written.knn_train):
        for label, (left, top, right, bottom) in boxes(folder):
            seen[label][top:bottom, left:right] = True
    for label, (left, top, right, bottom) in boxes(written.knn_test):
        assert not seen[label][top:bottom, left:right].any()
        assert right <= photographs[label].width
        assert bottom <= photographs[label].height


def test_regions_cover_a_photograph_without_overlap() -> None:
    for photograph in load_photographs():
        (left, _, border, _), (start, _, right, _) = regions(photograph)
        assert (left, border, right) == (0, start, photograph.width)
        assert min(photograph.width - border, photograph.height) >= tiles_module.TILE_SIDES[0]


def test_a_tile_shows_its_box(written: Any) -> None:
    photographs, source = load_photographs(), open_source(written.knn_test)
    for index, (label, box) in enumerate(boxes(written.knn_test)):
        expected = np.asarray(photographs[label].crop(box).resize((96, 96)), dtype=float)
        tile = np.asarray(decode(source.read(index)), dtype=float)
        assert np.abs(tile - expected).mean() < 12  # JPEG and another resampling filter


def test_bytes_follow_from_the_seed(written: Any, tmp_path: Path) -> None:
    again = write_tiles(tmp_path / "again", **FEW)
    other = write_tiles(tmp_path / "other", **FEW, seed=1)
    assert contents(again.train.parent) == contents(written.train.parent)
    assert contents(other.train) != contents(written.train)


def test_a_second_call_writes_nothing(written: Any) -> None:
    folder = written.train.parent
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert write_tiles(folder, **FEW) == written
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_shards_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "_SHARD_TILES", 20)
    train = write_tiles(tmp_path / "tiles", **FEW).train
    assert [p.name for p in sorted(train.iterdir())] == ["000000.tar", "000001.tar", "000002.tar"]
    source = open_source(train)
    names = [source.name(i) for i in range(len(source))]
    assert len(source) == 3 * len(PHOTOGRAPHS)
    assert names[20].endswith("000001.tar/000020.jpg")


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))
    encode = tiles_module._encode

    def stop_in_the_middle(*arguments: Any) -> Any:
        if next(calls) == 50:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(tiles_module, "_encode", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        write_tiles(tmp_path / "tiles", **FEW)
    assert list(tmp_path.iterdir()) == []


def _write(folder: Any) -> None:
    write_tiles(folder, **FEW)


def test_two_processes_at_once_agree(written: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path / "tiles",)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["tiles"]
    assert contents(tmp_path / "tiles") == contents(written.train.parent)


def test_a_folder_of_something_else_is_refused(written: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not hold the tiles asked for: remove it"):
        write_tiles(tmp_path, **FEW)
    with pytest.raises(DataError, match="does not hold the tiles asked for: remove it"):
        write_tiles(written.train.parent, **FEW, seed=5)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"tiles cannot be written to .*file/tiles: .*file\b"):
        write_tiles(tmp_path / "file" / "tiles", **FEW)


def test_missing_photographs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "PHOTOGRAPHS", (("no_such_package", "data/moon.png"),))
    with pytest.raises(DataError, match=r"data/moon\.png of no_such_package is not installed"):
        write_tiles(tmp_path / "tiles", **FEW)
    assert list(tmp_path.iterdir()) == []
