"""Broken files are refused with their cause, odd good ones decode: `decode` and `crops`."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seer_scale.data.augment import MultiCrop
from seer_scale.data.crops import cut_crops
from seer_scale.data.decode import BadImage, decode
from seer_scale.data.order import sample_rng
from tests.data.broken_files import BROKEN_KINDS, encode, make_broken, photograph, write_broken
from tests.data.odd_images import make_odd

MULTI_CROP = MultiCrop((32, 16), (2, 3))


@pytest.fixture(scope="module")
def broken() -> Any:
    return list(make_broken(np.random.default_rng(0)))


def draw(width: Any, height: Any) -> Any:
    return MULTI_CROP.draw(sample_rng(0, 0), width, height)


def cause_of(read: Any, *arguments: Any) -> Any:
    try:
        read(*arguments)
    except BadImage as error:
        return error.cause
    return None


def test_there_are_hundreds_of_many_kinds(broken: Any) -> None:
    assert len(BROKEN_KINDS) >= 20
    assert len(broken) >= 300
    assert len({file.name for file in broken}) == len(broken)


@pytest.mark.parametrize("kind", BROKEN_KINDS)
def test_every_broken_file_is_named_with_its_cause(broken: Any, kind: Any) -> None:
    prefix = kind.replace(" ", "-") + "-"
    files = [file for file in broken if file.name.startswith(prefix)]
    expected = {file.name: file.cause for file in files}
    assert {file.name: cause_of(cut_crops, file.data, draw) for file in files} == expected
    if kind != "spliced jpeg":  # the one that Pillow fills with gray
        assert {file.name: cause_of(decode, file.data) for file in files} == expected


def test_bombs_take_no_memory(broken: Any) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    bombs = [file for file in broken if file.cause in ("too large", "too many scans")]
    for file in bombs:
        assert cause_of(cut_crops, file.data, draw) == file.cause
    assert len(bombs) > 40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50 << 10


def test_odd_images_decode_well() -> None:
    for odd in make_odd(np.random.default_rng(1)):
        image = decode(odd.data)
        assert image.size == odd.expected.size, odd.name
        # JPEG loses a few levels on average, more where an image is two or three pixels in all.
        difference = np.abs(np.asarray(image, float) - np.asarray(odd.expected, float))
        assert difference.mean() < (5 if is_jpeg(odd.data) else 1e-9), odd.name
        crops, parameters = cut_crops(odd.data, draw)
        assert parameters == draw(*odd.expected.size), odd.name
        expected, _ = cut_crops(encode(odd.expected, "PNG"), draw)
        for crop, same, chosen in zip(crops, expected, parameters, strict=True):
            assert crop.shape == (chosen.size, chosen.size, 3), odd.name
            assert crop.dtype == np.uint8, odd.name
            assert np.abs(crop.astype(float) - same).mean() < 8, odd.name


def is_jpeg(data: Any) -> Any:
    return data.startswith(b"\xff\xd8")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_no_change_of_a_byte_raises_anything_else(kind: Any) -> None:
    """Bit rot in the header or anywhere gives crops or a `BadImage`."""
    rng = np.random.default_rng(2)
    data = encode(photograph(rng, 60, 50), kind)
    outcomes = set()
    for _ in range(150):
        changed = bytearray(data)
        end = len(data) if rng.random() < 0.3 else min(400, len(data))
        for position in rng.integers(2, end, 3):
            changed[position] = rng.integers(256)
        outcomes.add(cause_of(cut_crops, bytes(changed), draw))
    causes = {"not an image", "too large", "too many scans", "truncated", "damaged"}
    assert outcomes <= {None, *causes}
    assert outcomes & causes


def test_files_are_written_with_their_causes(tmp_path: Path) -> None:
    causes = write_broken(tmp_path, np.random.default_rng(0), copies=1)
    assert sorted(causes) == sorted(path.name for path in tmp_path.iterdir())
    assert len(causes) == len(BROKEN_KINDS)
