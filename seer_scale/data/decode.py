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


class BadImage(Exception):  # noqa: N818 - an event that is counted, not a failure of the program
    """Bytes that cannot be used; `cause` is one of a few fixed phrases."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes the first frame of an image to RGB, turned as its EXIF orientation says.

    Raises:
        BadImage: "zero bytes", "not an image", "too large" (by its header, before any pixel is
            decoded), "truncated" or "damaged".
    """
    if not data:
        raise BadImage("zero bytes")
    with warnings.catch_warnings():
        # Pillow warns about odd metadata in images that it then decodes well.
        warnings.simplefilter("ignore")
        image = _open(data)
        if image.width * image.height > max_pixels:
            raise BadImage("too large")
        try:
            image.load()
            return _to_rgb(_upright(image))
        except Exception as error:  # decoders raise whatever a broken file makes them trip over
            raise BadImage("truncated" if "truncated" in str(error) else "damaged") from error


def _open(data: bytes) -> Image.Image:
    """Reads the header only."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage("not an image") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too large") from error
    except Exception as error:
        raise BadImage("damaged") from error


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
