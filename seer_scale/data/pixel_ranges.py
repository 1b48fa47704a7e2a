"""Pixels of more than 8 bits, scaled to 8: the rule, and the images that the rule cannot scale.

Cameras and microscopes write 10, 12 or 14 bits into 16, integers into 32, and floating point from 0
to 1 or to 255, and hardly any file says which. An image taken for a wider one is black. Therefore:

1. If a TIFF names its smallest and largest sample value, these are black and white.
2. Else floating point of at most 1 is white at 1.
3. Else the range is the narrowest of 8, 10, 12, 14, 16 and 31 bits that holds the largest value.

An image that is still nearly black, or has values below 0, has no range that is known, and is bad.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFile

UNKNOWN = "pixels of unknown range"
"""The cause of an image whose values cannot be scaled."""

_BITS = (8, 10, 12, 14, 16, 31)
_DARK = 16  # of 255: an image without any brighter pixel is taken for black
_SMALLEST, _LARGEST = (340, 280), (341, 281)  # TIFF's SMinSampleValue, MinSampleValue, ...
_ROWS = 1 << 20  # pixels that are scaled at once


class UnknownRangeError(ValueError):
    """The range of an image's values is not known."""


def to_gray(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Returns an image of one wide channel in 8 bits.

    Args:
        image: an image for which `is_deep`.
        tags: the TIFF's tags by number; empty for other formats.

    Raises:
        UnknownRangeError: see the rule above.
    """
    values = np.asarray(image)
    darkest, brightest = values.min(), values.max()
    if not (np.isfinite(darkest) and np.isfinite(brightest)):
        raise UnknownRangeError(UNKNOWN)
    low, high = _stated(tags, float(darkest), float(brightest))
    if high is None and darkest < 0:
        raise UnknownRangeError(UNKNOWN)
    shift = next((bits - 8 for bits in _BITS if brightest < 1 << bits), None)
    if high is None and values.dtype.kind == "f":
        high = 1.0 if brightest <= 1 else None if shift is None else float((256 << shift) - 1)
    gray = np.empty(values.shape, np.uint8)
    step = max(1, _ROWS // values.shape[1])
    for top in range(0, values.shape[0], step):
        rows = slice(top, top + step)
        if high is not None:
            scaled = (values[rows].astype(np.float32) - low) * (255 / (high - low))
            gray[rows] = np.rint(scaled.clip(0, 255))
        elif shift is not None:
            gray[rows] = values[rows] >> shift
        else:
            raise UnknownRangeError(UNKNOWN)
    if brightest > low and gray.max() < _DARK:
        raise UnknownRangeError(UNKNOWN)
    return Image.fromarray(gray)


def check_high_bytes(image: Image.Image) -> None:
    """Checks that colours of 16 bits are not black in 8: Pillow keeps only their high bytes.

    Raises:
        UnknownRangeError: all colours are nearly black, as those of 12 bits in 16 are.
    """
    extrema: Any = image.getextrema()
    colours = extrema[:3] if isinstance(extrema[0], tuple) else [extrema]
    if max(high for _, high in colours) < _DARK:
        raise UnknownRangeError(UNKNOWN)


def is_wide(image: ImageFile.ImageFile) -> bool:
    """Returns whether an image that was opened, but not loaded, has 16 bits per colour."""
    return image.mode[0] in "RL" and any(";16" in str(tile[3]) for tile in image.tile)


def _stated(
    tags: Mapping[int, Any], darkest: float, brightest: float
) -> tuple[float, float | None]:
    """Returns black and white as a TIFF states them, if they hold its values; else 0 and None."""
    low, high = (
        next((number for tag in kinds if (number := _number(tags.get(tag))) is not None), None)
        for kinds in (_SMALLEST, _LARGEST)
    )
    low = 0.0 if low is None else low
    if high is None or not low <= darkest <= brightest <= high or low == high:
        return 0.0, None
    return low, high


def _number(value: Any) -> float | None:
    if isinstance(value, tuple):
        value = value[0] if value else None
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def is_deep(image: Image.Image) -> bool:
    """Returns whether a decoded image has one wide channel."""
    return image.mode.startswith("I") or image.mode == "F"
