"""Folders, tar shards and patterns: `sources`, `tars`, `shard_index` and `index_report`."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import socket
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from seer_scale.data import index_report
from seer_scale.data.cache import Cache
from seer_scale.data.image_folder import ImageFolder
from seer_scale.data.sources import open_source
from seer_scale.data.tars import TarShards
from seer_scale.errors import DataError


def write_tar(path: Any, members: Any, mode: Any = "w") -> Any:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shard(path: Any, first: Any, count: Any, **fields: Any) -> Any:
    members = {}
    for number in range(first, first + count):
        members[f"{number:06d}.jpg"] = b"image %d" % number * (1 + number % 7 * 50)
        members[f"{number:06d}.json"] = b"{}"
        members.update({f"{number:06d}.{ending}": value for ending, value in fields.items()})
    return write_tar(path, members)


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    root = tmp_path / "images"
    for name in ("b/2.PNG", "b/1.jpg", "a/deep/3.Jpeg", "top.webp", "notes.txt", ".hidden/4.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def test_image_folder_is_sorted_and_labelled(folder: Any) -> None:
    source = open_source(folder)
    assert isinstance(source, ImageFolder)
    assert [source.read(i).decode() for i in range(len(source))] == [
        "a/deep/3.Jpeg",
        "b/1.jpg",
        "b/2.PNG",
        "top.webp",
    ]
    assert source.name(1) == str(folder / "b/1.jpg")
    assert [source.label(i) for i in range(4)] == ["a", "b", "b", None]


def test_what_is_no_regular_file_is_not_opened(folder: Any, tmp_path: Path) -> None:
    """Opening a pipe waits for its writer, for ever; a link that leads nowhere is a bad image."""
    os.mkfifo(folder / "b" / "pipe.jpg")
    (folder / "b" / "link-to-pipe.jpg").symlink_to(folder / "b" / "pipe.jpg")
    (folder / "b" / "device.jpg").symlink_to("/dev/zero")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.relpath(folder / "b" / "socket.jpg"))
    (folder / "b" / "lost.jpg").symlink_to("nowhere")
    (folder / "linked").symlink_to(folder / "a")
    (folder / "link-to-image.jpg").symlink_to(folder / "b" / "1.jpg")
    source = open_source(folder)
    assert [os.path.relpath(source.name(i), folder) for i in range(len(source))] == [
        "a/deep/3.Jpeg",
        "b/1.jpg",
        "b/2.PNG",
        "b/lost.jpg",
        "link-to-image.jpg",
        "top.webp",
    ]
    assert source.left_out.lines() == [
        "left out: 1 folders that are listed already, under another name or above (links, mounts)"
        " (linked)",
        "left out: 1 hidden files and folders (.hidden)",
        "left out: 4 pipes, sockets and devices"
        " (b/device.jpg, b/link-to-pipe.jpg, b/pipe.jpg, ...)",
    ]
    with pytest.raises(FileNotFoundError):
        source.read(3)
    listener.close()

    os.mkfifo(tmp_path / "0.tar")
    shard(tmp_path / "1.tar", 0, 1)
    for path in (tmp_path / "0.tar", tmp_path / "*.tar"):
        with pytest.raises(DataError) as caught:
            open_source(path)
        assert "0.tar cannot be read (it is a pipe, socket or device)" in str(caught.value)
    (tmp_path / "manifest.jsonl").write_text('{"url": "0.tar", "count": 1, "bytes": 10000}\n')
    with pytest.raises(OSError, match="it is a pipe"):
        open_source(tmp_path / "manifest.jsonl").read(0)


def test_shards_are_read_at_random(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"s-{number:06d}.tar", number * 10, 10, cls=b"%d\n" % number)
    source = open_source(tmp_path)
    assert len(source) == 30
    for index in (29, 3, 17, 3):
        assert source.read(index) == b"image %d" % index * (1 + index % 7 * 50)
        assert source.name(index) == f"{tmp_path}/s-{index // 10:06d}.tar/{index:06d}.jpg"
        assert source.label(index) == index // 10


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seer_scale.data.tars.MOST_OPEN_SHARDS", 2)
    for number in range(5):
        shard(tmp_path / f"{number}.tar", number, 1)
    source = open_source(tmp_path)
    for index in (0, 1, 2, 3, 4, 0, 2):
        assert source.read(index).startswith(b"image %d" % index)
    assert isinstance(source, TarShards)
    assert len(source._opened) == 2


def test_shards_pickle_small_and_without_open_files(tmp_path: Path) -> None:
    source = open_source(shard(tmp_path / "a.tar", 0, 1000))
    assert source.read(5)
    data = pickle.dumps(source)
    assert len(data) < 100 * 1000  # bytes per image
    assert pickle.loads(data).read(5) == source.read(5)


def test_members_are_grouped_as_webdataset_does(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        {
            "x/1.seg.png": b"mask",
            "x/1.JPG": b"one",
            "x/1.cls": b"cat",
            "x/2.txt": b"no image",
            "y/1.png": b"two",
            "y/.DS_Store": b"",
            "y/" + "long" * 60 + ".jpg": b"three",
        },
    )
    source = open_source(path)
    assert [source.read(i) for i in range(len(source))] == [b"one", b"two", b"three"]
    assert [source.label(i) for i in range(3)] == ["cat", None, None]


def test_patterns(tmp_path: Path) -> None:
    for number in range(4):
        shard(tmp_path / f"part-{number:06d}.tar", number * 2, 2)

    def count(pattern: Any) -> Any:
        return len(open_source(f"{tmp_path}/{pattern}"))

    assert count("part-000002.tar") == 2
    assert count("part-{000000..000002}.tar") == 6
    assert count("part-00000[13].tar") == 4
    assert count("*.tar") == 8
    assert count("{part-000003,part-00000?}.tar") == 10  # as the shell, in the order given
    first = open_source(f"{tmp_path}/part-{{000003,000000}}.tar")
    assert first.name(0).endswith("part-000003.tar/000006.jpg")


# webdataset leaves its file to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = shard(tmp_path / "a.tar", 0, 5, cls=b"3")
    source = open_source(path)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [s["jpg"] for s in samples] == [source.read(i) for i in range(5)]
    assert [s["cls"] for s in samples] == [b"3"] * 5


def test_truncated_at_any_place_is_noticed(tmp_path: Path) -> None:
    whole = shard(tmp_path / "whole.tar", 0, 4).read_bytes()
    archive_end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    cut = tmp_path / "cut.tar"
    for length in range(512, archive_end + 1, 256):
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar"):
            open_source(cut)


def truncated_member(path: Any) -> Any:
    data = write_tar(path / "t.tar", {"1.jpg": bytes(700), "2.jpg": bytes(5000)}).read_bytes()
    (path / "t.tar").write_bytes(data[:4000])
    return path / "t.tar"


def truncated_end(path: Any) -> Any:
    data = write_tar(path / "t.tar", {"1.jpg": bytes(512), "2.jpg": bytes(512)}).read_bytes()
    (path / "t.tar").write_bytes(data[:2048])
    return path / "t.tar"


def damaged_header(path: Any) -> Any:
    data = bytearray(write_tar(path / "d.tar", {"1.jpg": bytes(5), "2.jpg": bytes(5)}).read_bytes())
    data[1024:1124] = b"#" * 100
    (path / "d.tar").write_bytes(data)
    return path / "d.tar"


def mixed(path: Any) -> Any:
    (path / "1.jpg").touch()
    return shard(path / "1.tar", 0, 1).parent


def text_file(path: Any, name: Any = "a.tar") -> Any:
    (path / name).write_text("no tar " * 200)
    return path / name


def one_of_pattern_missing(path: Any) -> Any:
    shard(path / "a-0.tar", 0, 1)
    return f"{path}/a-{{0..1}}.tar"


def loop(path: Any) -> Any:
    (path / "loop.tar").symlink_to("loop.tar")
    return path / "loop.tar"


def folder_named_tar(path: Any) -> Any:
    (path / "a.tar").mkdir()
    return f"{path}/*.tar"


def folder_of_text(path: Any) -> Any:
    (path / "readme.txt").touch()
    return path


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: "", "data.path is empty: give an image folder"),
        (lambda path: path / "nowhere", "nowhere does not exist: give an image folder"),
        (lambda path: path, "holds no images .* and no .tar shards"),
        (folder_of_text, "holds no images .* and no .tar shards"),
        (mixed, r"holds both images \(1.jpg\) and tar shards"),
        (lambda path: f"{path}/*.tar", r"/\*.tar matches nothing"),
        (lambda path: f"{path}/a-{{0..3}}.tar", r"names .*/a-0.tar, which does not exist"),
        (one_of_pattern_missing, r"names .*/a-1.tar, which does not exist"),
        (lambda path: f"{path}/a-{{0..3.tar", "a brace that is not closed"),
        (text_file, r"a.tar is neither an image folder nor a tar shard \(.*\): give an image"),
        (lambda path: text_file(path, "a.jpg"), "a.jpg is neither an image folder nor a tar shard"),
        (lambda path: f"{text_file(path, 'a.jpg').parent}/*.jpg", "a.jpg is neither an image"),
        (lambda path: text_file(path) / "b.tar", r"b.tar cannot be read \(Not a directory\): give"),
        (lambda path: path / ("x" * 300), r"xxx cannot be read \(File name too long\): give"),
        (loop, r"loop.tar cannot be read \(Too many levels of symbolic links\)"),
        (lambda path: f"{loop(path).parent}/*.tar", r"loop.tar cannot be read \(Too many levels"),
        (folder_named_tar, r"a.tar cannot be read \(Is a directory\): give"),
        (lambda path: write_tar(path / "z.tar", {"1.jpg": b"1"}, "w:gz"), "unpacked first"),
        (lambda path: write_tar(path / "z.tar", {"1.jpg": b"1"}, "w:xz"), "unpacked first"),
        (lambda path: write_tar(path / "n.tar", {"1.txt": b"1"}), "no images among its 1 members"),
        (lambda path: write_tar(path / "e.tar", {}), "no images among its 0 members"),
        (truncated_member, "t.tar is truncated in member 2.jpg: it is 4000 bytes long"),
        (truncated_end, "t.tar is truncated after member 2.jpg: the end mark"),
        (damaged_header, "d.tar is damaged after member 1.jpg"),
    ],
)
def test_each_fault_has_its_sentence(tmp_path: Path, make: Any, sentence: Any) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        open_source(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_zero_byte_shard_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    with pytest.raises(DataError, match=r"0\.tar is neither .* nor a tar shard \(empty file\)"):
        open_source(tmp_path)


@contextmanager
def unprivileged() -> Any:
    """Permissions do not bind root: acts as nobody for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("kind", ["folder", "subfolder", "shard"])
def test_unreadable_paths_are_named(kind: Any) -> None:
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    try:
        if kind == "shard":
            locked = target = shard(path / "a.tar", 0, 1)
        else:
            target = path / "images"
            locked = target if kind == "folder" else target / "sub"
            locked.mkdir(parents=True)
        locked.chmod(0)
        with unprivileged(), pytest.raises(DataError) as caught:
            open_source(target)
        assert str(locked) in str(caught.value)
        assert "permission denied" in str(caught.value)
    finally:
        locked.chmod(0o755)
        shutil.rmtree(path)


def test_shards_type(tmp_path: Path) -> None:
    assert isinstance(open_source(shard(tmp_path / "a.tar", 0, 1)), TarShards)


def test_shard_sizes_follow_the_numbering(tmp_path: Path, folder: Any) -> None:
    for number, count in enumerate((3, 1, 5)):
        shard(tmp_path / f"{number}.tar", 10 * number, count)
    source = open_source(f"{tmp_path}/{{0..2}}.tar")
    assert source.shard_sizes.tolist() == [3, 1, 5]
    assert source.shard_sizes.dtype == "int64"
    assert source.name(3).endswith("1.tar/000010.jpg")
    assert source.name(4).endswith("2.tar/000020.jpg")
    assert open_source(folder).shard_sizes.tolist() == [4]
    for outside in (-1, 9):
        with pytest.raises(IndexError):
            source.read(outside)


def test_the_version_is_that_of_names_and_counts(tmp_path: Path, folder: Any) -> None:
    for place in ("here", "elsewhere"):
        (tmp_path / place).mkdir()
        for number in range(2):
            shard(tmp_path / place / f"{number}.tar", number * 10, 4)
    version = open_source(tmp_path / "here").version
    assert len(bytes.fromhex(version)) == 8
    assert open_source(tmp_path / "elsewhere").version == version  # moved
    shard(tmp_path / "elsewhere/1.tar", 10, 5)
    assert open_source(tmp_path / "elsewhere").version != version
    assert open_source(f"{tmp_path}/here/{{1,0}}.tar").version != version
    before = open_source(folder).version
    (folder / "b/3.png").touch()
    assert open_source(folder).version != before


def test_threads_share_a_source_with_few_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seer_scale.data.tars.MOST_OPEN_SHARDS", 2)
    for number in range(6):
        shard(tmp_path / f"{number}.tar", number * 20, 20)
    source = open_source(tmp_path)
    wanted = [(index * 37) % 120 for index in range(1200)]
    with ThreadPoolExecutor(8) as pool:
        for index, data in zip(wanted, pool.map(source.read, wanted), strict=True):
            assert data == b"image %d" % index * (1 + index % 7 * 50)


def test_a_shard_that_shrinks_while_it_is_read_is_an_error_of_its_images(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 0, 4)
    source = open_source(path)
    assert source.read(0)
    os.truncate(path, 1024)
    with pytest.raises(OSError, match="has become shorter"):
        source.read(3)
    with pytest.raises(OSError, match=r"has 1024 bytes instead of \d+"):
        pickle.loads(pickle.dumps(source)).read(3)  # opens it anew


def test_the_index_of_local_shards_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30)
    path = shard(tmp_path / "a.tar", 0, 4, cls=b"7")
    assert len(open_source(path, cache)) == 4
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # nobody walks over headers
        again = open_source(path, cache)
        assert again.read(3) == b"image 3" * 151
        assert again.label(3) == 7
        assert again.name(3) == f"{path}/000003.jpg"
    shard(path, 0, 5)
    assert len(open_source(path, cache)) == 5
    for index in cache.indexes.iterdir():
        index.write_bytes(index.read_bytes()[:-100])  # damaged: made anew
    assert len(open_source(path, cache)) == 5


def test_a_shard_written_again_at_the_same_size_is_indexed_again(tmp_path: Path) -> None:
    cache, path = Cache(tmp_path / "cache", 1 << 30), tmp_path / "a.tar"
    for time_ns, images in enumerate(([b"cat" * 300, b"dog"], [b"cow", b"pig" * 300])):
        write_tar(path, {f"{number}.jpg": image for number, image in enumerate(images)})
        os.utime(path, ns=(time_ns, time_ns))  # file systems tell times in steps
        source = open_source(path, cache)
        assert [source.read(0), source.read(1)] == images
        assert path.stat().st_size == 10240


def test_report_and_manifest(tmp_path: Path) -> None:
    for number in range(25):
        shard(tmp_path / f"{number:02}.tar", number, 1 + number % 2)
    lines: list[str] = []
    index_report.index(str(tmp_path), None, str(tmp_path / "all.jsonl"), lines.append)
    assert len(lines) < 30
    assert re.search(r"^ +37 +[\d,]+ +25 shards, version [0-9a-f]{16}$", lines[-2])
    source, listed = open_source(tmp_path), open_source(tmp_path / "all.jsonl")
    assert listed.version == source.version
    assert listed.name(5).endswith("/03.tar[1]")
    assert [listed.read(i) for i in range(37)] == [source.read(i) for i in range(37)]
    assert [listed.name(i) for i in range(37)] == [source.name(i) for i in range(37)]
    with pytest.raises(DataError, match=r"manifest /nowhere/a\.jsonl cannot be written: No such"):
        index_report.index(str(tmp_path / "00.tar"), None, "/nowhere/a.jsonl", lines.append)


def test_report_of_a_folder(folder: Any) -> None:
    lines: list[str] = []
    index_report.index(str(folder), None, None, lines.append)
    assert lines[0].startswith("1 folder, 4 images, version ")
    with pytest.raises(DataError, match="only tar shards can be in a manifest"):
        index_report.index(str(folder), None, "a.jsonl", lines.append)
