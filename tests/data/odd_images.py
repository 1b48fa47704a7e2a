"""Odd but good images, as a crawl of the web finds them, each with its expected pixels."""

import io
import struct
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

from tests.data.broken_files import Rng, encode, photograph

EXIF_ORIENTATION = 0x0112


class OddImage(NamedTuple):
    """A file that must decode to `expected`, RGB, but for the losses of its format."""

    name: str
    data: bytes
    expected: Image.Image


def make_odd(rng: Rng) -> Iterator[OddImage]:
    """Odd but good files: modes, depths, orientations, animations, shapes, stray bytes."""
    width, height = (int(side) for side in rng.integers(100, 200, 2))
    photo = photograph(rng, width, height)
    yield from _modes(photo)
    yield from _orientations(photo)
    yield from _animations(photo, photograph(rng, width, height))
    yield from _jpegs(photo)
    yield from _shapes(rng)


def _modes(photo: Image.Image) -> Iterator[OddImage]:
    for mode in ("L", "LA", "RGBA", "P", "1"):
        converted = photo.convert(mode)
        yield OddImage(f"{mode}.png", encode(converted, "PNG"), converted.convert("RGB"))
    see_through = photo.convert("P")
    data = encode(see_through, "PNG", transparency=3)
    yield OddImage("palette with transparency.png", data, see_through.convert("RGB"))
    cmyk = photo.convert("CMYK")
    yield OddImage("cmyk.jpg", encode(cmyk, "JPEG", quality=95), photo)
    yield OddImage("cmyk.tif", encode(cmyk, "TIFF"), photo)
    yield OddImage(
        "gray.jpg", encode(photo.convert("L"), "JPEG"), photo.convert("L").convert("RGB")
    )
    gray = np.asarray(photo.convert("L"))
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        name = f"16 bit gray.{kind.lower()}"
        yield OddImage(name, encode(deep, kind), photo.convert("L").convert("RGB"))
    colours = np.asarray(photo)[..., ::-1].astype(np.uint16) * 257  # OpenCV writes BGR
    yield OddImage("16 bit colour.png", cv2.imencode(".png", colours)[1].tobytes(), photo)


def _orientations(photo: Image.Image) -> Iterator[OddImage]:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x010F] = "a maker"  # the orientation is not the first entry
        exif[EXIF_ORIENTATION] = orientation
        turned = photo.copy()
        turned.info["exif"] = exif.tobytes()
        expected = ImageOps.exif_transpose(turned)
        for kind in ("JPEG", "PNG"):
            data = encode(photo, kind, exif=exif.tobytes())
            yield OddImage(f"orientation {orientation}.{kind.lower()}", data, expected)
    big_endian = struct.pack(">4sIHHHIHHI", b"MM\0*", 8, 1, EXIF_ORIENTATION, 3, 1, 6, 0, 0)
    data = encode(photo, "JPEG", exif=b"Exif\0\0" + big_endian)
    yield OddImage("big endian exif.jpg", data, photo.transpose(Image.Transpose.ROTATE_270))
    for name, exif_bytes in {
        "nonsense": b"II*\0\xff\xff\xff\xff nonsense",
        "orientation 9": big_endian[:18] + b"\0\x09" + big_endian[20:],
        "cut short": big_endian[:12],
    }.items():
        data = encode(photo, "JPEG", exif=b"Exif\0\0" + exif_bytes)
        yield OddImage(f"exif {name}.jpg", data, photo)


def _animations(photo: Image.Image, second: Image.Image) -> Iterator[OddImage]:
    first, frames = photo.quantize(256), [second.quantize(256)]
    data = encode(first, "GIF", save_all=True, append_images=frames)
    yield OddImage("animated.gif", data, first.convert("RGB"))
    data = encode(photo, "WEBP", save_all=True, append_images=[second], lossless=True)
    yield OddImage("animated.webp", data, photo)
    data = encode(photo, "PNG", save_all=True, append_images=[second])
    yield OddImage("animated.png", data, photo)
    data = encode(photo, "TIFF", save_all=True, append_images=[second])
    yield OddImage("two pages.tif", data, photo)
    buffer = io.BytesIO()
    photo.save(buffer, "MPO", save_all=True, append_images=[second], quality=90)
    yield OddImage("stereo.mpo", buffer.getvalue(), photo)


def _jpegs(photo: Image.Image) -> Iterator[OddImage]:
    plain = encode(photo, "JPEG", quality=90)
    scan = plain.index(b"\xff\xda")
    yield OddImage("jpeg named png.png", plain, photo)
    yield OddImage("png named jpeg.jpg", encode(photo, "PNG"), photo)
    yield OddImage("progressive.jpg", encode(photo, "JPEG", progressive=True, quality=90), photo)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        data = encode(photo, "JPEG", subsampling=subsampling, quality=90)
        yield OddImage(f"sampling {subsampling}.jpg", data, photo)
    yield OddImage("rgb.jpg", encode(photo, "JPEG", keep_rgb=True, quality=90), photo)
    restarts = encode(photo, "JPEG", restart_marker_blocks=3, quality=90)
    yield OddImage("restarts.jpg", restarts, photo)
    profile = encode(photo, "JPEG", icc_profile=bytes(200_000), quality=90)
    yield OddImage("large profile.jpg", profile, photo)
    yield OddImage("bytes behind the end.jpg", plain + b"<html>" * 50, photo)
    yield OddImage("zeros behind the end.jpg", plain + bytes(4096), photo)
    yield OddImage("fill bytes.jpg", plain[:scan] + b"\xff" * 7 + plain[scan:], photo)
    yield OddImage("stray bytes.jpg", plain[:scan] + b"stray" + plain[scan:], photo)


_LEAST_LOSS = {"JPEG": {"quality": 95, "subsampling": "4:4:4"}}
_SHAPES = ((1, 1), (1, 300), (300, 1), (2, 3), (20_000, 3), (5, 20_000), (20_000, 1))


def _shapes(rng: Rng) -> Iterator[OddImage]:
    for width, height in _SHAPES:
        photo = photograph(rng, width, height)
        for kind in ("JPEG", "PNG", "BMP"):
            data = encode(photo, kind, **_LEAST_LOSS.get(kind, {}))
            yield OddImage(f"{width}x{height}.{kind.lower()}", data, photo)
