"""Broken files, as a crawl of the web leaves them, each with its cause.

Every file is made from seeded random numbers; nothing is downloaded or stored.
"""

import base64
import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

PILLOW = int(PIL.__version__.split(".")[0])
Rng = np.random.Generator
COPIES = 8  # of every broken kind


class BrokenFile(NamedTuple):
    """A file that must be refused."""

    name: str
    data: bytes
    cause: str


def make_broken(rng: Rng, copies: int = COPIES) -> Iterator[BrokenFile]:
    """At least 300 files of all kinds in `BROKEN_KINDS`, each of random size and content."""
    for kind, (suffix, cause, make) in BROKEN_KINDS.items():
        for copy in range(copies):
            yield BrokenFile(f"{kind.replace(' ', '-')}-{copy:02d}{suffix}", make(rng), cause)


def write_broken(folder: Path, rng: Rng, copies: int = COPIES) -> dict[str, str]:
    """Writes them into `folder`; returns the cause by file name."""
    causes = {}
    for name, data, cause in make_broken(rng, copies):
        (folder / name).write_bytes(data)
        causes[name] = cause
    return causes


def photograph(rng: Rng, width: int, height: int) -> Image.Image:
    """Smooth colour fields with a little noise: compresses like a photograph."""
    fields = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    smooth = np.asarray(fields.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-4, 5, smooth.shape, np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as a file of the given kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _encoded(rng: Rng, kind: str, **options: object) -> bytes:
    width, height = (int(side) for side in rng.integers(64, 200, 2))
    return encode(photograph(rng, width, height), kind, **options)


def _cut_short(kind: str, **options: object) -> Callable[[Rng], bytes]:
    def make(rng: Rng) -> bytes:
        data = _encoded(rng, kind, **options)
        return data[: int(len(data) * rng.uniform(0.5, 0.9))]

    return make


def _text(template: str) -> Callable[[Rng], bytes]:
    return lambda rng: template.replace("#", str(rng.integers(1 << 40))).encode()


def _patched(data: bytes, position: int, patch: bytes) -> bytes:
    return data[:position] + patch + data[position + len(patch) :]


def _jpeg_patched(marker: bytes, offset: int, patch: bytes) -> Callable[[Rng], bytes]:
    """A JPEG with other bytes at `offset` behind the first `marker`."""

    def make(rng: Rng) -> bytes:
        data = _encoded(rng, "JPEG")
        return _patched(data, data.index(marker) + offset, patch)

    return make


def _jpeg_without(marker: bytes) -> Callable[[Rng], bytes]:
    """A JPEG that lacks all segments of one kind."""

    def make(rng: Rng) -> bytes:
        data = _encoded(rng, "JPEG")
        while (start := data.find(marker)) >= 0:
            (length,) = struct.unpack_from(">H", data, start + 2)
            data = data[:start] + data[start + 2 + length :]
        return data

    return make


def _jpeg_spliced(rng: Rng) -> bytes:
    """A download whose middle is lost."""
    data = _encoded(rng, "JPEG")
    start = data.index(b"\xff\xda") + 14
    return data[: start + (len(data) - start) // 4] + data[-2:]


def _many_scans(rng: Rng) -> bytes:
    data = _encoded(rng, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 500 + data[-2:]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_header(width: int, height: int, bits: int = 8, color: int = 2) -> bytes:
    """The start of a PNG file of that size."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def _png_bomb(rng: Rng) -> bytes:
    """A sound file of a few kilobytes: black, and half a gigabyte once decoded."""
    side = int(rng.integers(11_000, 13_000))
    packed = zlib.compress(bytes(side * (side // 8 + 1)), 1)
    return png_header(side, side, bits=1, color=0) + png_chunk(b"IDAT", packed)


def _png_flipped(rng: Rng) -> bytes:
    data = bytearray(_encoded(rng, "PNG"))
    for position in rng.integers(len(data) // 4, len(data) // 2, 20):
        data[position] ^= 0xFF
    return bytes(data)


def _webp_bomb(rng: Rng) -> bytes:
    side = int(rng.integers(14_000, 16_000))
    sides = struct.pack("<I", side - 1)[:3]
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sides + sides
    body = b"WEBP" + extended + _encoded(rng, "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff_entry(tag: int, value: bytes) -> Callable[[Rng], bytes]:
    """A TIFF whose entry `tag` has another value."""

    def make(rng: Rng) -> bytes:
        data = _encoded(rng, "TIFF")
        (directory,) = struct.unpack_from("<I", data, 4)
        (entries,) = struct.unpack_from("<H", data, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            if struct.unpack_from("<H", data, entry)[0] == tag:
                return _patched(data, entry + 8, value)
        raise AssertionError(tag)

    return make


def _zip(rng: Rng) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("photo.jpg", _encoded(rng, "JPEG"))
    return buffer.getvalue()


_HUGE = struct.pack(">HH", 65_500, 65_500)
_PAGE = "<!DOCTYPE html><html><title>404 #</title><body>Not found</body></html>"
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:#\nsize 48211\n"

BROKEN_KINDS: dict[str, tuple[str, str, Callable[[Rng], bytes]]] = {
    "empty": (".jpg", "zero bytes", lambda rng: b""),
    "html page": (".jpg", "not an image", _text(_PAGE)),
    "json error": (".png", "not an image", lambda rng: json.dumps({"error": 403}).encode()),
    "xml error": (".jpg", "not an image", _text("<?xml?><Error><Code>NoSuchKey#</Code></Error>")),
    "svg": (".png", "not an image", _text("<svg xmlns='#'><rect width='9'/></svg>")),
    "lfs pointer": (".jpg", "not an image", _text(_POINTER)),
    "base64": (".jpg", "not an image", lambda rng: base64.b64encode(_encoded(rng, "JPEG"))),
    "zeros": (".jpg", "not an image", lambda rng: bytes(int(rng.integers(1, 10_000)))),
    "noise": (".jpg", "not an image", lambda rng: b"\x07" + rng.bytes(5000)),
    "pdf": (".jpg", "not an image", _text("%PDF-1.7\n#")),
    "zip": (".jpg", "not an image", _zip),
    "gzip": (".jpg", "not an image", lambda rng: gzip.compress(_encoded(rng, "JPEG"))),
    "video": (".jpg", "not an image", lambda rng: b"\0\0\0\x18ftypmp42" + rng.bytes(3000)),
    "resource fork": (".jpg", "not an image", lambda rng: b"\0\5\x16\7\0\2\0\0" + rng.bytes(82)),
    "other format": (".png", "not an image", lambda rng: _encoded(rng, "PPM")),
    "start lost": (".jpg", "not an image", lambda rng: _encoded(rng, "JPEG")[100:]),
    "read as text": (
        ".jpg",
        "not an image",
        lambda rng: _encoded(rng, "JPEG").decode("utf-8", "replace").encode(),
    ),
    "line ends changed": (
        ".png",
        "not an image",
        lambda rng: _encoded(rng, "PNG").replace(b"\r\n", b"\n"),
    ),
    "jpeg header only": (".jpg", "truncated", lambda rng: _encoded(rng, "JPEG")[:60]),
    "truncated jpeg": (".jpg", "truncated", _cut_short("JPEG")),
    "truncated progressive": (".jpg", "truncated", _cut_short("JPEG", progressive=True)),
    "truncated png": (".png", "truncated", _cut_short("PNG")),
    "truncated gif": (".gif", "truncated", _cut_short("GIF")),
    "truncated bmp": (".bmp", "truncated", _cut_short("BMP")),
    "truncated webp": (".webp", "truncated", _cut_short("WEBP")),
    "truncated tiff": (".tif", "truncated", _cut_short("TIFF", compression="tiff_lzw")),
    "jpeg bomb": (".jpg", "too large", _jpeg_patched(b"\xff\xc0", 5, _HUGE)),
    "png bomb": (".png", "too large", _png_bomb),
    "gif bomb": (".gif", "too large", lambda rng: _patched(_encoded(rng, "GIF"), 6, b"\xff" * 4)),
    "bmp bomb": (
        ".bmp",
        "too large",
        lambda rng: _patched(_encoded(rng, "BMP"), 18, struct.pack("<ii", 60_000, 60_000)),
    ),
    "tiff bomb": (".tif", "too large", _tiff_entry(256, struct.pack("<I", 50_000_000))),
    # Before version 13, Pillow does not tell the size of what it will not decode.
    "webp bomb": (".webp", "too large" if PILLOW >= 13 else "damaged", _webp_bomb),
    "many scans": (".jpg", "too many scans", _many_scans),
    "spliced jpeg": (".jpg", "damaged", _jpeg_spliced),
    "no quantisation": (".jpg", "damaged", _jpeg_without(b"\xff\xdb")),
    "no frame": (".jpg", "damaged", _jpeg_without(b"\xff\xc0")),
    "bad huffman table": (".jpg", "damaged", _jpeg_patched(b"\xff\xc4", 5, b"\xff" * 16)),
    "lossless jpeg": (".jpg", "damaged", _jpeg_patched(b"\xff\xc0", 0, b"\xff\xc3")),
    "twelve bits": (".jpg", "damaged", _jpeg_patched(b"\xff\xc0", 4, b"\x0c")),
    "no width": (".jpg", "damaged", _jpeg_patched(b"\xff\xc0", 7, b"\0\0")),
    "flipped png": (".png", "damaged", _png_flipped),
    "png checksum": (".png", "damaged", lambda rng: _patched(_encoded(rng, "PNG"), 29, b"0000")),
    "webp header": (
        ".webp",
        "damaged",
        lambda rng: _patched(_encoded(rng, "WEBP"), 20, bytes(10)),
    ),
    "tiff compression": (".tif", "damaged", _tiff_entry(259, struct.pack("<I", 31_000))),
}
