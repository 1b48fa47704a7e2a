"""Which files are images: told by the ending of a name, and by the first bytes of a file.

A file with an image's ending is an image, whatever it contains; decoding finds out. A file with an
ending that says nothing (`photo`, `45.jpg_large`) is an image if it begins like one.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Iterable
from typing import Self


def _suffixes(text: str) -> frozenset[str]:
    return frozenset(text.split())


IMAGE_SUFFIXES = _suffixes(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .avif .heic .heif .hif"
)
FOREIGN = "images in formats that are not decoded"
HIDDEN = "hidden files and folders"
HEAD = 32  # bytes that tell an image

_FOREIGN_SUFFIXES = _suffixes(
    ".jp2 .j2k .jpf .jpx .jxl .ppm .pgm .pbm .pnm .tga .ico .icns .psd .svg .eps .exr .hdr .dcm"
    " .pcx .dds .xcf .dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .pef .srw .raw"
)
# What usually lies beside images, and is not opened to see how it begins.
_OTHER_SUFFIXES = _suffixes(
    ".cls .txt .text .caption .json .jsonl .csv .tsv .xml .html .htm .yaml .yml .md .npy .npz .pt"
    " .pth .pkl .pickle .parquet .tar .gz .zip .db .ini .log .py .sh .pdf .mp4 .mov .avi .wav .mp3"
    " .h5 .safetensors"
)
_NO_LOOK = _OTHER_SUFFIXES | _FOREIGN_SUFFIXES
_NAMED_IMAGES = IMAGE_SUFFIXES | _FOREIGN_SUFFIXES
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes in bytes
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_LINE_SEPARATORS = ("Cc", "Cs", "Zl", "Zp")  # and what no terminal shows
_EXAMPLES = 3


class LeftOut:
    """Files that a collection leaves out: by reason the count and the first names, printable."""

    def __init__(self) -> None:
        self.reasons: dict[str, tuple[int, list[str]]] = {}

    def add(self, reason: str, names: Iterable[str], count: int = 1) -> None:
        """Adds `count` things under a reason, and the names of some of them."""
        before, known = self.reasons.get(reason, (0, []))
        known = [*known, *map(printable, names)][:_EXAMPLES]
        self.reasons[reason] = before + count, known

    def join(self, other: LeftOut, prefix: str = "") -> None:
        """Adds what another one holds, with a prefix before its names."""
        for reason, (count, names) in other.reasons.items():
            self.add(reason, [prefix + name for name in names], count)

    def lines(self) -> list[str]:
        """Returns a line per reason: `left out: 3 ... (a.jpg, b.jpg, c.jpg)`."""
        lines = []
        for reason, (count, names) in sorted(self.reasons.items()):
            more = ", ..." if count > len(names) else ""
            lines.append(f"left out: {count:,} {reason} ({', '.join(names)}{more})")
        return lines

    def to_json(self) -> bytes:
        """Returns it as text for `from_json`."""
        return json.dumps(self.reasons).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: the text is something else.
        """
        found = cls()
        try:
            for reason, (count, names) in json.loads(data).items():
                found.add(str(reason), [str(name) for name in names], int(count))
        except (AttributeError, TypeError, RecursionError) as error:
            raise ValueError(str(error)) from error
        return found


def is_image(name: str, head: Callable[[], bytes]) -> bool:
    """Returns whether a file is an image.

    Args:
        name: name of the file.
        head: reads the first `HEAD` bytes; called only if the name does not tell.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    return suffix not in _NO_LOOK and begins_like_image(head())


def is_foreign(name: str) -> bool:
    """Returns whether a name says that the file is an image in a format that is not decoded."""
    return os.path.splitext(name)[1].lower() in _FOREIGN_SUFFIXES


def has_image_suffix(name: str) -> bool:
    """Returns whether a name ends like an image's, decoded or not."""
    return os.path.splitext(name)[1].lower() in _NAMED_IMAGES


def begins_like_image(head: bytes) -> bool:
    """Returns whether the first `HEAD` bytes are those of an image in a format with a suffix."""
    if head.startswith(b"BM"):
        return head[6:10] == bytes(4) and int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    return head.startswith(_STARTS) or webp or is_avif(head) or is_heic(head)


def is_avif(head: bytes) -> bool:
    """Returns whether a file begins like an AVIF."""
    return head[4:8] == b"ftyp" and head[8:12] in _AVIF_BRANDS


def is_heic(head: bytes) -> bool:
    """Returns whether a file begins like the HEIC photographs of telephones."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS


def printable(name: str) -> str:
    r"""Returns a file's name fit to print, draw and log: every other byte is written as `\xe9`.

    Names of files are bytes; Python hides those that are not UTF-8 in characters that no output
    takes. Control characters and line ends are written in the same way.
    """
    return name if name.isprintable() else "".join(map(_printable, name))


def _printable(char: str) -> str:
    if 0xDC80 <= ord(char) <= 0xDCFF:  # a byte that was not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    if unicodedata.category(char) in _LINE_SEPARATORS:
        return char.encode("unicode_escape").decode()
    return char
