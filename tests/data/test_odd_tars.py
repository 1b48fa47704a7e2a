"""Every image in a tar is used or named, whatever way people made the tar."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seer_scale.commands.data import main
from seer_scale.data.cache import Cache
from seer_scale.data.sources import open_source
from seer_scale.data.tars import TarShards
from tests.data.odd_tars import ODD_TARS, write


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    rng, found = np.random.default_rng(0), []
    for _ in range(6):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


def test_there_are_25_kinds() -> None:
    assert len(ODD_TARS) >= 25


@pytest.mark.parametrize("kind", ODD_TARS)
def test_images_are_used_or_counted_as_left_out(
    tmp_path: Path, photos: list[bytes], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, odd = tmp_path / "shard.tar", ODD_TARS[kind]
    odd.make(path, photos)
    cache = Cache(tmp_path / "cache", 1 << 30)
    for _ in ("built", "from the kept index"):
        source = open_source(path, cache)
        assert isinstance(source, TarShards)
        names = [source.name(index).removeprefix(f"{path}/") for index in range(len(source))]
        assert names == list(odd.used)
        counts = {reason: count for reason, (count, _) in source.left_out.reasons.items()}
        assert counts == odd.left_out
    bytes_read = [source.read(index) for index in range(len(source))]
    assert set(bytes_read) <= set(photos)
    copies = Counter(Counter(bytes_read).values())
    assert copies == ({2: 3} if "copy" in "".join(names) else copies)
    if len(names) == 6 and "copy" not in "".join(names):
        assert sorted(bytes_read) == sorted(photos)

    sheet = str(tmp_path / "sheet.png")
    for words in (["index", str(path)], ["inspect", str(path), "--out", sheet]):
        assert main(words) == 0
        said = capsys.readouterr().out
        for reason, count in odd.left_out.items():
            assert f"left out: {count} {reason} (shard.tar/" in said
        assert ("left out" in said) == bool(odd.left_out)


def test_joined_shards_keep_the_label_of_each_image(tmp_path: Path, photos: list[bytes]) -> None:
    """Both number their images from 0, so that the names are the same."""
    parts = []
    for label in (b"cat", b"dog"):
        write(tmp_path / "a.tar", [("0.jpg", photos[0]), ("0.cls", label)])
        parts.append((tmp_path / "a.tar").read_bytes())
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    source = open_source(tmp_path / "a.tar")
    assert [source.label(index) for index in range(len(source))] == ["cat", "dog"]


def test_labels_follow_names_with_dots(tmp_path: Path, photos: list[bytes]) -> None:
    write(
        tmp_path / "a.tar",
        [
            *(("scan.1.jpg", photos[0]), ("scan.2.jpg", photos[1]), ("scan.2.cls", b"two")),
            *(("scan.1.cls", b"one"), ("all.1.jpg", photos[2]), ("all.cls", b"of all")),
        ],
    )
    source = open_source(tmp_path / "a.tar")
    assert [source.label(index) for index in range(len(source))] == ["one", "two", "of all"]


def test_several_shards_add_up(tmp_path: Path, photos: list[bytes]) -> None:
    for name in ("masks beside the images", "other formats", "plain"):
        ODD_TARS[name].make(tmp_path / f"{name.partition(' ')[0]}.tar", photos)
    (tmp_path / "more.tar.gz").write_bytes(b"\x1f\x8b")
    source = open_source(tmp_path)
    assert len(source) == 9
    assert source.left_out.lines() == [
        "left out: 1 archives that are not read: unpack them, or make plain tars of them"
        " (more.tar.gz)",
        "left out: 3 further images of a sample that has one"
        " (masks.tar/0.seg.png, masks.tar/0.png, masks.tar/1.depth.png)",
        "left out: 2 images in formats that are not decoded (other.tar/1.jp2, other.tar/2.dng)",
    ]
