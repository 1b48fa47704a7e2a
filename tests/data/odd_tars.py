"""Tars as people make them, each with its truth: the images used, and the members left out."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from seer_scale.data.image_kinds import FOREIGN, HIDDEN

FURTHER = "further images of a sample that has one"
BEHIND = "pieces behind the end of an archive that are no tar"
LONG = "folder/" + "n" * 150


Make = Callable[[Path, Sequence[bytes]], None]


class OddTar(NamedTuple):
    """A way to make a tar.

    Attributes:
        make: writes the tar, given its path and the contents of six photographs.
        used: names of the images, in order.
        left_out: number of members that are not used, by reason.
    """

    make: Make
    used: Sequence[str]
    left_out: dict[str, int] = {}  # noqa: RUF012 - never changed


Entry = tuple[str, bytes] | tarfile.TarInfo


def write(path: Path, entries: Sequence[Entry], form: int = tarfile.GNU_FORMAT) -> None:
    """Writes entries, files or bare headers, into a tar."""
    with tarfile.open(path, "w", format=form) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                header = tarfile.TarInfo(entry[0])
                header.size = len(entry[1])
                tar.addfile(header, io.BytesIO(entry[1]))


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tarfile.TarInfo:
    """A header without content that leads to another member."""
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    """A header of a pipe, device or folder."""
    header = tarfile.TarInfo(name)
    header.type = kind
    return header


def _named(*names: str, form: int = tarfile.GNU_FORMAT) -> OddTar:
    """Photographs under the given names, all of them used."""
    return OddTar(
        lambda path, photos: write(path, list(zip(names, photos, strict=False)), form), names
    )


def _mixed(
    entries: Callable[[Sequence[bytes]], Sequence[Entry]],
    used: Sequence[str],
    left_out: dict[str, int] | None = None,
) -> OddTar:
    return OddTar(lambda path, photos: write(path, entries(photos)), used, left_out or {})


def _joined(
    *parts: Sequence[str], between: bytes = b"", behind: bytes = b""
) -> Callable[..., None]:
    """`cat a.tar b.tar`, with other bytes between or behind."""

    def make(path: Path, photos: Sequence[bytes]) -> None:
        whole, rest = [], list(photos)
        for names in parts:
            write(path, [(name, rest.pop(0)) for name in names])
            whole.append(path.read_bytes())
        path.write_bytes(between.join(whole) + behind)

    return make


def _by_tar(*options: str) -> Make:
    """A folder in which three of six names are hard links, packed by `tar` itself."""

    def make(path: Path, photos: Sequence[bytes]) -> None:
        folder = path.with_suffix(".folder") / "photos"
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"{number}.jpg").write_bytes(photos[number])
            os.link(folder / f"{number}.jpg", folder / f"{number}_copy.jpg")
        names = sorted(f"photos/{name}" for name in os.listdir(folder))
        command = ["tar", *options, "-cf", str(path), "-C", str(folder.parent), *names]
        subprocess.run(command, check=True)

    return make


SIX = [f"{number:04d}.jpg" for number in range(6)]
COPIES = ["photos/0.jpg", "photos/0_copy.jpg", "photos/1.jpg", "photos/1_copy.jpg"]
COPIES += ["photos/2.jpg", "photos/2_copy.jpg"]

ODD_TARS: dict[str, OddTar] = {
    "plain": _named(*SIX),
    "some names with dots": _named(*SIX[:3], *(f"IMG_2019.06.{n}.jpg" for n in range(3))),
    "names of one first word": _named(*(f"photo v1.{n}.jpg" for n in range(6))),
    "a further name with a number": _named("scan.jpg", *(f"scan.{n}.jpg" for n in range(2, 7))),
    "folders with dots": _named(*(f"v1.0/{name}" for name in SIX)),
    "the same name in several folders": _named(*(f"{n}/image.jpg" for n in range(6))),
    "a name twice": _mixed(
        lambda photos: list(zip(SIX[:3] * 2, photos, strict=True)), sorted(SIX[:3] * 2)
    ),
    "fields named by webdataset": _named(*(f"s{n}.input.jpg" for n in range(6))),
    "upper case": _named(*(name.upper() for name in SIX)),
    "without endings": _named(*(name[:4] for name in SIX)),
    "endings of the web": _named("a.jpg_large", "b.jpg?w=9", "c.jpg!d", "d.image", "e ", "f.jpg~"),
    "jpegs named heic": _named(*(f"{n}.heic" for n in range(6))),
    "long names": _named(*(f"{LONG}/{name}" for name in SIX)),
    "long names of pax": _named(
        *(f"{LONG}/日本{n}.jpg" for n in range(6)), form=tarfile.PAX_FORMAT
    ),
    "ustar": _named(*SIX, form=tarfile.USTAR_FORMAT),
    "from windows": _named(*(f"v1.0\\{n}.jpg" for n in range(6))),
    "names from here": _named(*(f"./{name}" for name in SIX)),
    "joined by cat": OddTar(_joined(SIX[:3], SIX[3:]), SIX),
    "three joined, numbered alike": OddTar(_joined(*[SIX[:2]] * 3), sorted(SIX[:2] * 3)),
    "joined with zeros between": OddTar(_joined(SIX[:3], SIX[3:], between=bytes(5120)), SIX),
    "bytes behind the end": OddTar(_joined(SIX, behind=b"<html>" * 99), SIX, {BEHIND: 1}),
    "joined with a compressed one": OddTar(
        _joined(SIX, behind=b"\x1f\x8b\x08" + bytes(range(256))), SIX, {BEHIND: 1}
    ),
    "hard links": OddTar(_by_tar(), COPIES),
    "hard links of pax": OddTar(_by_tar("--format=pax"), COPIES),
    "a link to a link": _mixed(
        lambda photos: [("a.jpg", photos[0]), link("b.jpg", "a.jpg"), link("c.jpg", "b.jpg")],
        ["a.jpg", "b.jpg", "c.jpg"],
    ),
    "links that lead nowhere": _mixed(
        lambda photos: [("a.jpg", photos[0]), link("b.jpg", "/etc/passwd"), link("c.jpg", "d.jpg")],
        ["a.jpg"],
        {"hard links to members that are not in the shard": 2},
    ),
    "symbolic links": _mixed(
        lambda photos: [("a.jpg", photos[0]), link("b.jpg", "a.jpg", tarfile.SYMTYPE)],
        ["a.jpg"],
        {"symbolic links": 1},
    ),
    "pipes, devices and folders": _mixed(
        lambda photos: [
            ("a.jpg", photos[0]),
            *(special(f"{n}.jpg", kind) for n, kind in enumerate((b"3", b"4", b"5", b"6"))),
        ],
        ["a.jpg"],
        {"members that are no files": 3},
    ),
    "other fields beside the images": _mixed(
        lambda photos: [
            entry
            for n, photo in enumerate(photos)
            for entry in ((f"{n}.json", b"{}"), (f"{n}.jpg", photo), (f"{n}.txt", b"a cat"))
        ],
        [f"{n}.jpg" for n in range(6)],
    ),
    "masks beside the images": _mixed(
        lambda photos: [
            *(("0.jpg", photos[0]), ("0.seg.png", photos[1]), ("0.png", photos[2])),
            *(("1.jpg", photos[3]), ("1.depth.png", photos[4])),
        ],
        ["0.jpg", "1.jpg"],
        {FURTHER: 3},
    ),
    "what a mac adds": _mixed(
        lambda photos: [
            *(("__MACOSX/._0.jpg", b"\0\5\x16\7"), ("._0.jpg", b"\0\5\x16\7"), (".DS_Store", b"")),
            *(("README.md", b"x"), ("0.jpg", photos[0]), (".jpg", photos[1])),
        ],
        ["0.jpg"],
        {HIDDEN: 3},
    ),
    "other formats": _mixed(
        lambda photos: [("0.jpg", photos[0]), ("1.jp2", photos[1]), ("2.dng", photos[2])],
        ["0.jpg"],
        {FOREIGN: 2},
    ),
}
