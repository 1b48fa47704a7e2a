"""Formats, EXIF orientation, and a cause for each image that cannot be used."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from seer_scale.data.decode import BadImage, _reads_heic, decode


def encode(image: Any, kind: Any, **options: Any) -> Any:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def gradient() -> Any:
    ramp = np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)
    return Image.fromarray(ramp)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_back_exactly(gradient: Any, kind: Any) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(np.asarray(decode(encode(gradient, kind, **options))), gradient)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_other_modes_become_rgb(gradient: Any, mode: Any) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    image = decode(encode(gradient.convert(mode), kind))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), gradient.convert(mode).convert("RGB"))


def test_sixteen_bit_gray_is_scaled_not_clipped() -> None:
    deep = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    image = decode(encode(Image.fromarray(deep), "PNG"))
    assert np.array_equal(np.asarray(image)[..., 0], deep >> 8)


def test_exif_orientation_is_applied(gradient: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image = decode(encode(gradient, "PNG", exif=exif))
    assert image.size == (30, 40)
    assert np.array_equal(np.asarray(image), gradient.transpose(Image.Transpose.ROTATE_270))


def test_broken_exif_does_not_spoil_the_image(gradient: Any) -> None:
    data = encode(gradient, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff nonsense")
    assert decode(data).size == (40, 30)


def test_animation_gives_its_first_frame(gradient: Any) -> None:
    frames = [gradient.convert("L").convert("RGB"), Image.new("RGB", gradient.size)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(decode(data)), frames[0])


def png_header(width: Any, height: Any) -> Any:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + b"\x00\x00\x00\x00IDAT"
    )


def cases() -> Any:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    jpeg, png = encode(image, "JPEG"), encode(image, "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty": (b"", "zero bytes"),
        "html": (b"<!DOCTYPE html><html>404</html>", "not an image"),
        "zeros": (bytes(1000), "not an image"),
        "half a jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half a png": (png[: len(png) // 2], "truncated"),
        "a few bytes of jpeg": (jpeg[:20], "truncated"),
        "flipped byte in png": (bytes(flipped), "damaged"),
        "format outside the list": (encode(image, "PPM"), "not an image"),
        "bomb": (png_header(60_000, 60_000), "too large"),
        "above our limit": (png_header(10_001, 10_000), "too large"),
    }


@pytest.mark.parametrize("name", cases())
def test_what_cannot_be_used_has_a_cause(name: Any) -> None:
    data, cause = cases()[name]
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.cause == cause


def test_size_is_checked_before_decoding(gradient: Any) -> None:
    data = encode(gradient, "PNG")
    with pytest.raises(BadImage, match="too large"):
        decode(data[: len(data) // 2], max_pixels=40 * 30 - 1)
    assert decode(data, max_pixels=40 * 30).size == (40, 30)


def test_no_prefix_of_a_file_raises_anything_else(gradient: Any) -> None:
    """Wherever a download stops, the answer is an image or a BadImage."""
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
        data = encode(gradient, kind)
        outcomes = set()
        for length in range(0, len(data), max(1, len(data) // 60)):
            try:
                decode(data[:length])
                outcomes.add("image")
            except BadImage as error:
                outcomes.add(error.cause)
        assert outcomes <= {"image", "zero bytes", "not an image", "truncated", "damaged"}
        assert len(outcomes) > 1


def test_heic_without_its_decoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pillow_heif.register_heif_opener()
    heic = encode(Image.fromarray(noise), "HEIF", quality=95)
    assert decode(heic).size == (60, 40)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    _reads_heic.cache_clear()
    with pytest.raises(
        BadImage, match=r"HEIC, which needs pillow-heif \(pip install pillow-heif\)"
    ):
        decode(heic)
    _reads_heic.cache_clear()
