"""Decodes bytes to an upright RGB image, or raises `BadImage` with a short cause.

Files from the web may be truncated, mislabelled, huge or not images at all. Each of these is an
expected event, never a crash, and the causes are counted.
"""

from __future__ import annotations

import io
import warnings
from functools import cache

from PIL import Image, ImageOps, UnidentifiedImageError, features

from seer_scale.data.image_kinds import HEAD, begins_like_image, is_avif, is_heic
from seer_scale.data.pixel_ranges import (
    UNKNOWN,
    UnknownRangeError,
    check_high_bytes,
    is_deep,
    is_wide,
    to_gray,
)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Formats that Pillow decodes itself; of its other formats, some start external programs."""

MAX_PIXELS = 100_000_000
"""Largest width times height that is decoded: 300 MB as RGB."""

MAX_SCANS = 100
"""Most scans of a progressive JPEG. Encoders make about 10; each takes time for the whole image."""

_JPEG, _PNG, _TIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*")
NO_HEIC = "HEIC, which needs pillow-heif (pip install pillow-heif)"
NO_AVIF = "AVIF, which this Pillow does not decode"
"""The causes of photographs of telephones whose decoder is not installed."""

# Pillow warns about odd metadata in images that it decodes well. The warnings are silenced once,
# because `warnings.catch_warnings` around every image is not safe with threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):  # noqa: N818 - an event that is counted, not a failure of the program
    """An image that cannot be used; `cause` is one of a few fixed phrases."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def cause_of(error: BadImage | OSError) -> str:
    """Returns the phrase under which a bad image is counted."""
    if isinstance(error, BadImage):
        return error.cause
    return f"unreadable: {error.strerror or error}"


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes the first frame of an image to RGB, rotated by its EXIF orientation.

    Args:
        data: bytes of the file.
        max_pixels: largest width times height that is decoded.

    Raises:
        BadImage: "zero bytes"; "not an image" in one of `FORMATS`; "too large" or "too many scans"
            (both read from the header, before any pixel is decoded); "truncated"; "pixels of
            unknown range", see `pixel_ranges`; `NO_HEIC`, `NO_AVIF`; or "damaged",
            which includes variants of a format that no decoder here supports.
    """
    if not data:
        raise BadImage("zero bytes")
    try:
        heic = is_heic(data[:HEAD]) and _reads_heic()
        image = Image.open(io.BytesIO(data), formats=(*FORMATS, "HEIF") if heic else FORMATS)
        if image.width * image.height > max_pixels:
            raise BadImage("too large")
        if data.startswith(_JPEG):
            check_scans(data)
        wide, tags = is_wide(image), getattr(image, "tag_v2", {})
        image.load()
        upright = _upright(image)
        if is_deep(upright):
            upright = to_gray(upright, tags)
        elif wide:
            check_high_bytes(upright)
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except BadImage:
        raise
    except UnknownRangeError as error:
        raise BadImage(UNKNOWN) from error
    except Image.DecompressionBombError as error:
        raise BadImage("too large") from error
    except Exception as error:  # decoders raise whatever a broken file makes them trip over
        raise BadImage(_cause(data, error)) from error


@cache
def _reads_heic() -> bool:
    """Teaches Pillow HEIC, if `pillow-heif` is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False)
    return True


def check_scans(data: bytes) -> None:
    """Checks, without decoding, that a JPEG has so few scans that decoding takes no minutes.

    Raises:
        BadImage: "too many scans".
    """
    # In compressed data FF is always followed by 00 or D0 to D7, so almost only scans are counted.
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise BadImage("too many scans")


def _cause(data: bytes, error: Exception) -> str:
    """Returns the cause for a file that Pillow cannot open or decode."""
    if "truncated" in str(error).lower() or _ends_early(data):
        return "truncated"
    if isinstance(error, UnidentifiedImageError):
        if is_heic(data[:HEAD]) and not _reads_heic():
            return NO_HEIC
        if is_avif(data[:HEAD]) and not features.check("avif"):
            return NO_AVIF
        known = begins_like_image(data[:HEAD]) and not data.startswith(b"BM")
        return "damaged" if known else "not an image"
    return "damaged"


def _ends_early(data: bytes) -> bool:
    """Returns whether the end marks or sizes in the file show that its end is missing."""
    if data.startswith(_JPEG):
        return b"\xff\xd9" not in data
    if data.startswith(_PNG):
        return b"IEND" not in data
    if data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if is_avif(data[:HEAD]) or is_heic(data[:HEAD]):
        return _end_of_boxes(data) > len(data)
    if data.startswith(_TIFF):
        return len(data) <= int.from_bytes(data[4:8], "little" if data[0] == ord("I") else "big")
    return False


def _end_of_boxes(data: bytes) -> int:
    """Returns where the last box of an AVIF or HEIC ends; 0 if its size is not stated."""
    end = 0
    while end + 8 <= len(data):
        size = int.from_bytes(data[end : end + 4])
        if size < 8:  # to the end of the file, or a number of 64 bits
            return 0
        end += size
    return end


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; ignores broken EXIF."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image
