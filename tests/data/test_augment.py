"""Drawing and distorting against torchvision: boxes, probabilities, pixels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter
from scipy.stats import chisquare, ks_2samp, kstest
from torchvision import transforms

from seer_scale.data.augment import CropParameters, MultiCrop, distort, normalise
from seer_scale.data.order import sample_rng
from seer_scale.errors import ConfigError
from seer_scale.preprocessing import MEAN, STD

DRAWS = 2000
P_VALUE = 1e-4  # seeds are fixed: a failure is a changed distribution, not bad luck


@pytest.fixture(scope="module")
def image() -> Any:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((150, 120), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photographs() -> Any:
    names = ("astronaut", "coffee", "chelsea", "rocket", "retina")
    return [Image.fromarray(getattr(skimage.data, name)()).resize((96, 96)) for name in names]


def draws(multi_crop: Any, width: Any = 150, height: Any = 120) -> Any:
    return [p for i in range(DRAWS) for p in multi_crop.draw(sample_rng(5, i), width, height)]


@pytest.mark.parametrize("scale", [(0.14, 1.0), (0.05, 0.14)])
@pytest.mark.parametrize(("width", "height"), [(150, 120), (40, 200), (300, 30)])
def test_boxes_are_distributed_as_torchvisions(scale: Any, width: Any, height: Any) -> None:
    torch.manual_seed(0)
    blank = Image.new("RGB", (width, height))
    expected = np.array(
        [
            transforms.RandomResizedCrop.get_params(blank, scale, (3 / 4, 4 / 3))
            for _ in range(DRAWS)
        ]
    )
    boxes = np.array([p.box for p in draws(MultiCrop((8,), (1,), (scale,)), width, height)])
    left, top, right, bottom = boxes.T
    assert boxes.min() >= 0
    assert right.max() <= width
    assert bottom.max() <= height
    for ours, theirs in zip((top, left, bottom - top, right - left), expected.T, strict=True):
        assert ks_2samp(ours, theirs).pvalue > P_VALUE


def test_a_box_may_lie_anywhere_up_to_all_four_edges() -> None:
    boxes = [p.box for p in draws(MultiCrop((8,), (1,), ((0.1, 0.5),)), 12, 9)]
    for first, side in ((0, 12), (1, 9)):  # left and width, top and height
        begins: dict[int, set[int]] = {}
        for box in boxes:
            begins.setdefault(box[first + 2] - box[first], set()).add(box[first])
        assert len(begins) > 4
        for length, found in begins.items():
            assert found == set(range(side - length + 1)), length


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
def test_jitter_is_distributed_as_torchvisions(strength: Any) -> None:
    torch.manual_seed(0)
    reference = transforms.ColorJitter(*(strength * s for s in (0.8, 0.8, 0.8, 0.2)))
    ranges = (reference.brightness, reference.contrast, reference.saturation, reference.hue)
    expected = [transforms.ColorJitter.get_params(*ranges) for _ in range(DRAWS)]
    crops = draws(MultiCrop((8,), (1,), ((0.14, 1.0),), color_distortion=strength))
    jittered = [p for p in crops if p.jitter]
    for which in range(4):
        ours = [p.jitter[which] for p in jittered]
        theirs = [parameters[1 + which] for parameters in expected]
        assert ks_2samp(ours, theirs).pvalue > P_VALUE
    orders, counts = np.unique([p.jitter_order for p in jittered], axis=0, return_counts=True)
    assert len(orders) == 24
    assert chisquare(counts).pvalue > P_VALUE


def test_probabilities_and_blur_are_the_published_ones() -> None:
    crops = draws(MultiCrop((8,), (1,), ((0.14, 1.0),)))

    def share(flags: Any) -> Any:
        return np.mean(list(flags))

    # 5 standard deviations of a share of 2000 are at most 0.056
    assert share(p.flip for p in crops) == pytest.approx(0.5, abs=0.056)
    assert share(p.jitter is not None for p in crops) == pytest.approx(0.8, abs=0.056)
    assert share(p.grayscale for p in crops) == pytest.approx(0.2, abs=0.056)
    assert share(p.blur > 0 for p in crops) == pytest.approx(0.5, abs=0.056)
    radii = [p.blur for p in crops if p.blur]
    assert kstest(radii, "uniform", args=(0.1, 1.9)).pvalue > P_VALUE


def test_choices_of_one_crop_are_independent() -> None:
    crops = draws(MultiCrop((8,), (1,), ((0.14, 1.0),)))
    table = np.array(
        [
            (*p.box, p.flip, p.jitter is not None, *(p.jitter or (1, 1, 1, 0)), p.grayscale, p.blur)
            for p in crops
        ]
    )
    correlation = np.corrcoef(table[:, 4:].T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 / np.sqrt(DRAWS)


def test_zero_strengths_switch_off() -> None:
    crops = draws(MultiCrop((8,), (1,), ((1.0, 1.0),), color_distortion=0, blur_probability=0))
    assert all(p.jitter is None and p.blur == 0 for p in crops)


def reference(crop: Any, p: CropParameters) -> Any:
    """SwAV's composition after the crop, spelled with torchvision and PIL."""
    if p.flip:
        crop = F.hflip(crop)
    if p.jitter:
        brightness, contrast, saturation, hue = p.jitter
        for which in p.jitter_order:
            if which == 0:
                crop = F.adjust_brightness(crop, brightness)
            elif which == 1:
                crop = F.adjust_contrast(crop, contrast)
            elif which == 2:
                crop = F.adjust_saturation(crop, saturation)
            else:
                crop = F.adjust_hue(crop, hue)
    if p.grayscale:
        crop = F.to_grayscale(crop, 3)
    if p.blur:
        crop = crop.filter(ImageFilter.GaussianBlur(radius=p.blur))
    return crop


def parameters(**changes: Any) -> Any:
    neutral = CropParameters(
        size=96,
        box=(0, 0, 96, 96),
        flip=False,
        jitter=None,
        jitter_order=(0, 1, 2, 3),
        grayscale=False,
        blur=0.0,
    )
    return dataclasses.replace(neutral, **changes)


def jitter(which: Any, *amounts: Any) -> Any:
    """Parameters of one of the four adjustments alone."""
    return [
        parameters(jitter=(amount, amount, amount, amount), jitter_order=(which,))
        for amount in amounts
    ]


FACTORS = (0.2, 0.7, 1.0, 1.3, 1.8)

# Largest and mean difference in levels of 255 from Pillow. Blends differ where the float32 of
# Pillow lands on the other side of a whole number; hues because Pillow counts 255 steps of the
# circle and truncates, OpenCV 256 and rounds; blurs because Pillow rounds after each of six passes.
OPERATIONS = {
    "flip": ([parameters(flip=True)], 0, 0.0),
    "brightness": (jitter(0, *FACTORS), 1, 0.05),
    "contrast": (jitter(1, *FACTORS), 1, 0.05),
    "saturation": (jitter(2, *FACTORS), 1, 0.01),
    "hue": (jitter(3, -0.2, -0.1, -0.03, 0.0, 0.05, 0.2), 8, 1.0),
    "grayscale": ([parameters(grayscale=True)], 1, 0.01),
    "blur": ([parameters(blur=radius) for radius in (0.1, 0.3, 0.7, 1.2, 2.0)], 4, 0.7),
}
MARGIN = 6  # of a blur: each of Pillow's passes repeats the edge anew


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_close_to_torchvisions(photographs: Any, operation: Any) -> None:
    choices, largest, mean = OPERATIONS[operation]
    for crop in photographs:
        for p in choices:
            before = np.array(crop)
            ours = distort(before, p).astype(float)
            assert np.array_equal(before, crop)  # never written to
            difference = np.abs(ours - np.asarray(reference(crop, p), float))
            inside = slice(MARGIN, -MARGIN) if p.blur else slice(None)
            assert difference[inside, inside].max() <= largest
            assert difference.mean() <= mean


@pytest.mark.parametrize("radius", [0.1, 0.5, 0.999, 1.0, 1.5, 2.0])
def test_blur_has_the_standard_deviation_that_was_asked_for(radius: Any) -> None:
    dot = np.zeros((31, 31, 3), np.uint8)
    dot[:, 15] = 255
    profile = distort(dot, parameters(size=31, blur=radius))[15, :, 0].astype(float)
    positions = np.arange(31) - 15
    variance = (profile * positions**2).sum() / profile.sum()
    # 255 levels round the far ends of the bell away.
    assert np.sqrt(variance) == pytest.approx(radius, abs=0.04)


def test_composition_has_torchvisions_statistics(photographs: Any) -> None:
    """The same draws: pixels differ by the rounding of each operation, in no direction."""
    multi_crop = MultiCrop((96,), (1,), ((0.5, 1.0),))
    used = set()
    distorted, expected = [], []
    for index in range(300):
        crop = photographs[index % len(photographs)]
        (p,) = multi_crop.draw(sample_rng(1, index), 96, 96)
        distorted.append(distort(np.asarray(crop), p))
        expected.append(np.asarray(reference(crop, p)))
        used.add((p.flip, bool(p.jitter), p.grayscale, p.blur > 0))
    assert len(used) == 16  # every combination was compared
    ours, theirs = np.stack(distorted).astype(float), np.stack(expected).astype(float)
    assert np.abs(ours - theirs).mean() < 1.5
    for statistic in (np.mean, np.std):
        difference = statistic(ours, (1, 2)) - statistic(theirs, (1, 2))  # [300, 3]
        assert np.abs(difference.mean(0)).max() < 0.5
    shares = [np.histogram(images, 16, (0, 256))[0] / images.size for images in (ours, theirs)]
    assert np.abs(shares[0] - shares[1]).max() < 0.005


def test_normalise_equals_torchvisions(image: Any) -> None:
    expected = F.normalize(F.to_tensor(image), MEAN, STD)
    assert torch.equal(normalise(torch.from_numpy(np.array(image))), expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"counts": (2,)}, "crop_counts and data.crop_scales need one entry per resolution"),
        ({"scales": ((0.5, 0.2), (0.1, 0.2))}, r"crop_scales has \[0.5, 0.2\]"),
        ({"scales": ((0.5, 1.2), (0.1, 0.2))}, r"crop_scales has \[0.5, 1.2\]"),
        ({"color_distortion": 3.0}, "color_distortion=3.0 is outside 0 to 2.5"),
    ],
)
def test_impossible_settings_are_named(arguments: Any, sentence: Any) -> None:
    with pytest.raises(ConfigError, match=sentence):
        MultiCrop(**{"sizes": (64, 32), "counts": (2, 4), **arguments})
