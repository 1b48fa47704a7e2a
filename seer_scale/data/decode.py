"""Bytes to an upright RGB image, or a `BadImage` with a short cause that can be counted.

Images from the web are truncated, mislabelled, huge or no images at all; each of these is an
ordinary event here, never a crash.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What may be decoded: Pillow knows dozens more, some of which run external programs."""

MAX_PIXELS = 100_000_000
"""Width times height that is still decoded: 300 MB as RGB."""


MAX_SCANS = 100
"""Passes of a progressive JPEG; encoders make about 10, each costs time for the whole image."""

_JPEG, _PNG, _TIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*")
_SIGNATURES = (_JPEG, _PNG, *_TIFF, b"GIF8")

# Pillow warns about odd metadata in images that it then decodes well. Silenced once, because
# `warnings.catch_warnings` around every image would not be safe in several threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):  # noqa: N818 - an event that is counted, not a failure of the program
    """Bytes that cannot be used; `cause` is one of a few fixed phrases."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def cause_of(error: BadImage | OSError) -> str:
    """Why an image cannot be used, in the words that bad images are counted under."""
    if isinstance(error, BadImage):
        return error.cause
    return f"unreadable: {error.strerror or error}"


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes the first frame of an image to RGB, turned as its EXIF orientation says.

    Raises:
        BadImage: "zero bytes"; "not an image" of `FORMATS`; by its header, before any pixel is
            decoded, "too large" or "too many scans"; "truncated"; or "damaged", which includes
            variants of a format that no decoder here knows.
    """
    if not data:
        raise BadImage("zero bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadImage("too large")
        if data.startswith(_JPEG):
            check_scans(data)
        image.load()
        return _to_rgb(_upright(image))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("too large") from error
    except Exception as error:  # decoders raise whatever a broken file makes them trip over
        raise BadImage(_cause(data, error)) from error


def check_scans(data: bytes) -> None:
    """Refuses a JPEG whose scans would keep a decoder busy for minutes, without decoding it.

    Raises:
        BadImage: "too many scans".
    """
    # In compressed data FF is always followed by 00 or D0 to D7, so hardly anything else counts.
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise BadImage("too many scans")


def _cause(data: bytes, error: Exception) -> str:
    """What is wrong with a file that Pillow cannot open or decode."""
    if "truncated" in str(error).lower() or _ends_early(data):
        return "truncated"
    known = data.startswith(_SIGNATURES) or data[8:12] == b"WEBP"
    unidentified = isinstance(error, UnidentifiedImageError) and not known
    return "not an image" if unidentified else "damaged"


def _ends_early(data: bytes) -> bool:
    """Whether the file's own marks say that its end is missing."""
    if data.startswith(_JPEG):
        return b"\xff\xd9" not in data
    if data.startswith(_PNG):
        return b"IEND" not in data
    if data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data.startswith(_TIFF):
        return len(data) <= int.from_bytes(data[4:8], "little" if data[0] == ord("I") else "big")
    return False


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; broken EXIF does not spoil a sound image."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255 instead of scale
        high_bytes = np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8
        image = Image.fromarray(high_bytes.astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
