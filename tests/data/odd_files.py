"""Files of every kind met so far, with their truth: pixels, a cause, or why they are left out.

Whoever meets a new kind of file adds it here: `test_odd_files.py` holds decoding, folders, tars,
evaluation and `data inspect` to the same truth.
"""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pillow_heif
from PIL import Image, TiffImagePlugin

from seer_scale.data.image_kinds import FOREIGN, HIDDEN
from tests.data.broken_files import Rng, encode, make_broken, photograph, png_chunk, png_header
from tests.data.odd_images import make_odd

pillow_heif.register_heif_opener()  # to write them
LOSSY = 5.0  # levels by which JPEG, WebP, AVIF and HEIC miss the picture on average
RANGE = "pixels of unknown range"
# What Pillow fills with gray, and only the loader's decoder refuses.
ONLY_CROPS = b"spliced-jpeg"


class OddFile(NamedTuple):
    """A file, and one of three truths.

    Attributes:
        name: name of the file, as bytes: names need not be UTF-8.
        data: content.
        pixels: the picture that it must decode to, RGB.
        loss: levels by which the format misses the picture on average.
        cause: the cause under which it counts as a bad image.
        left_out: the reason for which it is no image of the collection.
    """

    name: bytes
    data: bytes
    pixels: Image.Image | None = None
    loss: float = 0.0
    cause: str | None = None
    left_out: str | None = None


def make_odd_files(rng: Rng) -> Iterator[OddFile]:
    """Makes all kinds; every name begins with a number, as no two files share a stem."""
    number = 0
    for kinds in (_decoded, _refused, _scientific, _thin, _named, _passed_over):
        for file in kinds(rng):
            number += 1
            hidden = b"." if file.name.startswith(b".") else b""
            yield file._replace(name=hidden + b"%03d " % number + file.name.lstrip(b"."))


def write_folder(folder: Path, files: list[OddFile]) -> None:
    """Writes the files into a folder."""
    folder.mkdir(parents=True)
    for file in files:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + file.name)).write_bytes(file.data)


def write_tar(path: Path, files: list[OddFile]) -> None:
    """Writes the files into a tar."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for file in files:
            member = tarfile.TarInfo(os.fsdecode(file.name))
            member.size = len(file.data)
            tar.addfile(member, io.BytesIO(file.data))


def _decoded(rng: Rng) -> Iterator[OddFile]:
    for odd in make_odd(rng):
        loss = LOSSY if odd.data.startswith(b"\xff\xd8") else 0.0
        yield OddFile(odd.name.encode(), odd.data, odd.expected, loss)
    photo = photograph(rng, 120, 90)
    yield OddFile(b"phone.avif", encode(photo, "AVIF", quality=95), photo, LOSSY)
    yield OddFile(b"avif named.heic", encode(photo, "AVIF", quality=95), photo, LOSSY)
    heic = encode(photo, "HEIF", quality=95)
    yield OddFile(b"phone.heic", heic, photo, LOSSY)
    yield OddFile(b"heic named.jpg", heic, photo, LOSSY)
    yield OddFile(b"jpeg named.heic", encode(photo, "JPEG", quality=95), photo, LOSSY)


def _refused(rng: Rng) -> Iterator[OddFile]:
    for broken in make_broken(rng, copies=1):
        yield OddFile(broken.name.encode(), broken.data, cause=broken.cause)
    heic = encode(photograph(rng, 120, 90), "HEIF", quality=95)
    yield OddFile(b"half.heic", heic[: len(heic) // 2], cause="truncated")
    boxes = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic\0\0\x0b\xc0mdat" + rng.bytes(3000)
    yield OddFile(b"empty.heic", boxes, cause="damaged")
    avif = encode(photograph(rng, 120, 90), "AVIF", quality=95)
    yield OddFile(b"half.avif", avif[: len(avif) // 2], cause="truncated")


def _tiff(values: np.ndarray, **tags: float) -> bytes:
    """A TIFF of one channel; tags by name."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        directory[{"smallest": 280, "largest": 281, "ssmallest": 340, "slargest": 341}[name]] = (
            value
        )
    return encode(Image.fromarray(values), "TIFF", tiffinfo=directory)


def _scientific(rng: Rng) -> Iterator[OddFile]:
    photo = photograph(rng, 110, 80).convert("L")
    levels = np.asarray(photo).copy()
    levels[0, 0], levels[0, 1] = 255, 0  # so that the range is the whole one
    truth = Image.fromarray(levels).convert("RGB")
    for bits in (10, 12, 14, 16):
        deep = levels.astype(np.uint16) << (bits - 8)
        yield OddFile(b"%d in 16 bits.tif" % bits, _tiff(deep), truth)
        yield OddFile(b"%d in 16 bits.png" % bits, encode(Image.fromarray(deep), "PNG"), truth)
        yield OddFile(b"%d in 32 bits.tif" % bits, _tiff(deep.astype(np.int32)), truth)
    yield OddFile(b"8 in 32 bits.tif", _tiff(levels.astype(np.int32)), truth)
    yield OddFile(b"31 bits.tif", _tiff(levels.astype(np.int32) << 23), truth)
    unit = levels.astype(np.float32) / 255
    yield OddFile(b"float to 1.tif", _tiff(unit), truth, 0.6)
    yield OddFile(b"float to 255.tif", _tiff(levels.astype(np.float32)), truth)
    yield OddFile(b"float to 65535.tif", _tiff(levels.astype(np.float32) * 257), truth)
    stated = _tiff(unit * 3000 - 1000, ssmallest=-1000.0, slargest=2000.0)
    yield OddFile(b"float, range stated.tif", stated, truth, 0.6)
    half = Image.fromarray((levels.astype(int) * 100 // 200).astype(np.uint8)).convert("RGB")
    stated = _tiff(levels.astype(np.uint16) * 100, smallest=0, largest=51_000)
    yield OddFile(b"16 bits, range stated.tif", stated, half, 0.6)
    black = Image.new("RGB", photo.size)
    yield OddFile(b"black float.tif", _tiff(levels * np.float32(0)), black)
    yield OddFile(
        b"black 16 bits.png", encode(Image.fromarray(levels * np.uint16(0)), "PNG"), black
    )

    for name, values in {
        "negative": unit - 0.5,
        "not a number": np.where(levels == 255, np.nan, unit),
        "infinite": np.where(levels == 255, np.inf, unit),
        "a little above 1": unit * 1.02,
        "huge": unit * np.float32(1e20),
        "numbers of objects": (levels // 32).astype(np.int32),
        "faint 16 bits": (levels // 32).astype(np.uint16),
        "heights": levels.astype(np.int32) - 100,
        "a million": levels.astype(np.int32) * 4000,
    }.items():
        data = _tiff(values.astype(np.float32) if values.dtype == np.float64 else values)
        yield OddFile(name.encode() + b".tif", data, cause=RANGE)
    colours = np.asarray(photograph(rng, 110, 80)).astype(np.uint16)
    for kind in (".png", ".tif"):
        dark = cv2.imencode(kind, colours << 4)[1].tobytes()
        yield OddFile(b"12 in 16 bits of colour" + kind.encode(), dark, cause=RANGE)


def _thin(rng: Rng) -> Iterator[OddFile]:
    """Files of a few kilobytes that would take gigabytes if they were resized whole."""
    for width, height in ((1, 60_000), (60_000, 1), (2, 45_000), (1, 1_000_000)):
        row = rng.integers(0, 256, 3, dtype=np.uint8)
        photo = Image.fromarray(np.broadcast_to(row, (height, width, 3)).copy())
        yield OddFile(b"%dx%d.png" % (width, height), encode(photo, "PNG"), photo)
    lines = b"\0\0" * 20_000_000
    data = png_header(1, 20_000_000, bits=8, color=0) + png_chunk(b"IDAT", zlib.compress(lines, 1))
    yield OddFile(
        b"1x20000000.png", data + png_chunk(b"IEND", b""), Image.new("RGB", (1, 20_000_000))
    )


def _named(rng: Rng) -> Iterator[OddFile]:
    """Sound images whose names are the difficulty."""
    photo = photograph(rng, 60, 50)
    data = encode(photo, "PNG")
    for name in (
        b"caf\xe9.png",
        "ünï 100% #1?.png".encode(),
        b"new\nline.png",
        b"\x1b[31mred.png",
        b"IMG_2019.06.1.png",
        b"no ending",
        b"photo.jpg_large",
        b"photo.jpg?w=300",
        b"UPPER.PNG",
        b"space at the end.png ",
        b"$a$ b$.png",
        "nihongo 日本語.png".encode(),
        b"from-windows\\photo.png",
    ):
        yield OddFile(name, data, photo)


def _passed_over(rng: Rng) -> Iterator[OddFile]:
    """What is no image of the collection, and has to be named."""
    photo = photograph(rng, 60, 50)
    yield OddFile(b".hidden.png", encode(photo, "PNG"), left_out=HIDDEN)
    yield OddFile(b"other.ppm", encode(photo, "PPM"), left_out=FOREIGN)
    yield OddFile(b"other.jp2", encode(photo, "JPEG2000"), left_out=FOREIGN)
    yield OddFile(b"raw.dng", encode(photo, "TIFF"), left_out=FOREIGN)
    yield OddFile(b"drawing.svg", b"<svg/>", left_out=FOREIGN)
