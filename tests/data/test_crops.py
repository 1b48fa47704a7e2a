"""Crops from scaled decoding against torchvision's on the whole image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

import numpy as np
import pytest
import skimage.data
import torchvision.transforms.functional as F
from PIL import Image

from seer_scale.data.augment import CropParameters, MultiCrop
from seer_scale.data.crops import cut_crops, smallest_scale
from seer_scale.data.decode import BadImage, decode
from seer_scale.data.order import sample_rng
from tests.data.broken_files import encode

MULTI_CROP = MultiCrop((64, 40), (2, 4))


def crop_of(box: Any, size: Any) -> Any:
    return CropParameters(size, box, False, None, (0, 1, 2, 3), False, 0.0)


def given(crops: list[CropParameters]) -> Callable[[int, int], list[CropParameters]]:
    return lambda width, height: crops


def reference(image: Any, p: Any) -> Any:
    """Torchvision's resized crop of a Pillow image, float64."""
    left, top, right, bottom = p.box
    crop = F.resized_crop(image, top, left, bottom - top, right - left, [p.size, p.size])
    return np.asarray(crop, float)


@pytest.fixture(scope="module", params=["astronaut", "coffee", "rocket"])
def photograph(request: pytest.FixtureRequest) -> Any:
    return Image.fromarray(getattr(skimage.data, request.param)())


@pytest.fixture(scope="module")
def ramp() -> Any:
    """Red grows to the right, green downwards, 8 pixels a level."""
    rows, columns = np.mgrid[0:1501, 0:2003]
    return Image.fromarray(np.stack([columns // 8, rows // 8, 0 * rows], -1).astype(np.uint8))


def test_crops_of_a_lossless_image_equal_torchvisions(photograph: Any) -> None:
    for index in range(5):
        crops, parameters = cut_crops(
            encode(photograph, "PNG"),
            partial(MULTI_CROP.draw, sample_rng(0, index)),
        )
        assert parameters == MULTI_CROP.draw(sample_rng(0, index), *photograph.size)
        for crop, p in zip(crops, parameters, strict=True):
            difference = np.abs(crop - reference(photograph, p))
            assert difference.max() <= 1  # the two implementations round differently
            assert difference.mean() < 0.1


@pytest.mark.parametrize("aligned", [True, False])
def test_scaled_decoding_changes_crops_little(photograph: Any, aligned: Any) -> None:
    """Against all of the photograph decoded by Pillow, then cropped and resized."""
    large = photograph.resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encode(large, "JPEG", quality=90)
    decoded = decode(data)
    differences, means, deviations = [], [], []
    for index in range(6):
        drawn = MULTI_CROP.draw(sample_rng(0, index), *large.size)
        if aligned:  # to the grid of the transform
            boxes: list[Any] = [tuple(edge // 8 * 8 for edge in p.box) for p in drawn]
            drawn = [dataclasses.replace(p, box=box) for p, box in zip(drawn, boxes, strict=True)]
        crops, _ = cut_crops(data, given(drawn))
        for crop, p in zip(crops, drawn, strict=True):
            expected = reference(decoded, p)
            differences.append(np.abs(crop - expected).mean())
            means.append(crop.mean() - expected.mean())
            deviations.append(crop.std() / expected.std())
    # The filters differ by less than a level. Boxes between the pixels of the scaled image are
    # rounded to them, which moves the content by up to half a pixel of the crop, in no direction.
    assert np.mean(differences) < (1.2 if aligned else 4)
    assert np.abs(np.mean(means)) < 0.2
    assert np.abs(means).max() < (0.3 if aligned else 2)
    assert np.mean(deviations) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_hit_the_same_place_at_every_scale(ramp: Any, orientation: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(ramp, "JPEG", quality=95, exif=exif.tobytes())
    upright = decode(data)
    for side in (50, 110, 210, 310, 410, 810, 1450):  # eighths 8, 8, 4, 4, 2, 1, 1 of crops of 100
        width = upright.width
        p = crop_of((width - side - 3, 31, width - 3, 31 + side), 100)
        (crop,), _ = cut_crops(data, given([p]))
        # Half a pixel at the smallest scale is 4 pixels of the ramp, half a level.
        bias = (crop - reference(upright, p)).mean((0, 1))
        assert np.abs(bias).max() < 0.75


def test_scale_is_the_smallest_at_which_no_crop_is_enlarged() -> None:
    def scale(*sides: Any) -> Any:
        return smallest_scale([crop_of((0, 0, side, side + 9), 100) for side in sides])

    assert scale(800) == 1
    assert scale(799) == 2
    assert scale(400) == 2
    assert scale(200) == 4
    assert scale(199) == 8
    assert scale(100) == 8
    assert scale(20) == 8
    assert scale(800, 5000) == 1
    assert scale(5000, 300) == 4  # the smaller box decides


def test_size_is_checked_before_decoding(photograph: Any) -> None:
    data = encode(photograph, "JPEG")
    pixels = photograph.width * photograph.height
    with pytest.raises(BadImage, match="too large"):
        cut_crops(data[: len(data) // 2], fail, max_pixels=pixels - 1)
    with pytest.raises(BadImage, match="truncated"):
        cut_crops(data[: len(data) // 2], lambda w, h: [crop_of((0, 0, w, h), 8)])


def fail(width: Any, height: Any) -> NoReturn:
    raise AssertionError("drawn for an image that is refused")


def test_threads_do_not_disturb_each_other(photograph: Any) -> None:
    data = encode(photograph, "JPEG")

    def cut(index: Any) -> Any:
        return cut_crops(data, lambda w, h: MULTI_CROP.draw(sample_rng(0, index), w, h))[0]

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(cut, range(20)))
    for index, crops in enumerate(together):
        for crop, alone in zip(crops, cut(index), strict=True):
            assert np.array_equal(crop, alone)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_tiny_and_thin_images_give_full_crops(size: Any, kind: Any) -> None:
    rng = sample_rng(0, 0)
    data = encode(Image.new("RGB", size, (9, 99, 199)), kind)
    crops, _ = cut_crops(data, lambda w, h: MULTI_CROP.draw(rng, w, h))
    assert [crop.shape for crop in crops] == [(64, 64, 3)] * 2 + [(40, 40, 3)] * 4
    assert all(abs(crop.mean((0, 1)) - (9, 99, 199)).max() < 3 for crop in crops)
