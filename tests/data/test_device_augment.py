"""Augmentation in batch against torchvision's, operation by operation and as a whole."""

from __future__ import annotations

import io
import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from torchvision import transforms

from seer_scale.data.augment import CropParameters, MultiCrop, distort
from seer_scale.data.crops import cut_crops
from seer_scale.data.device_augment import COLUMNS, distort_batch, pack
from seer_scale.data.generate.tiles import load_photographs
from seer_scale.data.order import sample_rng
from seer_scale.preprocessing import MEAN, STD

SIDE = 64
P_VALUE = 1e-4  # seeds are fixed: a failure is a changed distribution, not bad luck
ORDERS = tuple(itertools.permutations(range(4)))
NEUTRAL = (1.0, 1.0, 1.0, 0.0)
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.fixture(scope="module")
def crops():
    """One square per photograph, uint8 `[15, SIDE, SIDE, 3]`."""
    pixels = []
    for image in load_photographs():
        side = min(image.size)
        square = image.crop((0, 0, side, side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels.append(np.asarray(square))
    return torch.from_numpy(np.stack(pixels))


def choose(flip=False, jitter=None, order=(0, 1, 2, 3), grayscale=False, blur=0.0):
    return CropParameters(SIDE, (0, 0, 1, 1), flip, jitter, order, grayscale, blur)


def levels(normalised):
    """Back to 0 to 255, `[N, 3, s, s]`."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (normalised * std + mean) * 255


def run(crops, *parameters):
    """The same crops with the same parameters each, or with their own."""
    chosen = list(parameters) * len(crops) if len(parameters) == 1 else list(parameters)
    return levels(distort_batch(crops, pack(chosen)))


def channels_first(crops):
    return crops.movedim(-1, 1).float()


def by_tensor(crops, parameters):
    """torchvision's operations on one float image at a time, in 0 to 255."""
    images = []
    for pixels, p in zip(channels_first(crops) / 255, parameters, strict=True):
        image = F.horizontal_flip(pixels) if p.flip else pixels
        for which in p.jitter_order if p.jitter else ():
            image = ADJUST[which](image, p.jitter[which])
        image = F.rgb_to_grayscale(image, 3) if p.grayscale else image
        images.append(image * 255)
    return torch.stack(images)


def by_pillow(crops, parameters):
    """torchvision's operations on PIL images, as SwAV composes them."""
    images = []
    for pixels, p in zip(crops, parameters, strict=True):
        image = Image.fromarray(pixels.numpy())
        image = F.horizontal_flip(image) if p.flip else image
        for which in p.jitter_order if p.jitter else ():
            # A shift of 0 would still go through Pillow's coarse HSV.
            if p.jitter[which] != NEUTRAL[which]:
                image = ADJUST[which](image, p.jitter[which])
        image = F.to_grayscale(image, 3) if p.grayscale else image
        image = image.filter(ImageFilter.GaussianBlur(p.blur)) if p.blur else image
        images.append(np.asarray(image))
    return channels_first(torch.from_numpy(np.stack(images)))


def random_parameters(count, seed=0, **fixed):
    """As a training draws them."""
    multi_crop = MultiCrop((SIDE,), (count,), ((0.14, 1.0),), **fixed)
    return multi_crop.draw(sample_rng(seed, 0), 640, 480)


def test_nothing_chosen_changes_nothing(crops):
    assert torch.allclose(run(crops, choose()), channels_first(crops), atol=1e-3)


def test_flip_mirrors_the_columns(crops):
    assert torch.allclose(run(crops, choose(flip=True)), channels_first(crops).flip(3), atol=1e-3)


# A blend adds rounding of float32. torchvision's red has weight 0.2989 in gray, Pillow's 0.299:
# 0.0001 * 255 levels, times up to 1.8 of saturation and contrast.
@pytest.mark.parametrize("which", range(4), ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("strength", [0.0, 0.2, 0.7, 1.0, 1.3, 1.8])
def test_an_adjustment_equals_torchvisions_on_float_tensors(crops, which, strength):
    jitter = list(NEUTRAL)
    jitter[which] = strength if which < 3 else (strength - 0.9) * 0.2
    chosen = choose(jitter=tuple(jitter))
    expected = ADJUST[which](channels_first(crops) / 255, jitter[which]) * 255
    assert (run(crops, chosen) - expected).abs().max() < 0.05


def test_hue_of_every_colour_equals_torchvisions():
    """Ties of channels, gray, black and white among them."""
    steps = torch.tensor([0, 1, 63, 64, 127, 128, 192, 254, 255], dtype=torch.uint8)
    colours = torch.cartesian_prod(steps, steps, steps).view(1, 27, 27, 3)
    for shift in (-0.5, -0.21, -1e-3, 0.0, 1 / 6, 0.2, 0.5):
        ours = run(colours, choose(jitter=(1.0, 1.0, 1.0, shift)))
        expected = F.adjust_hue(channels_first(colours) / 255, shift) * 255
        # 1e-3 of the range: a difference of two large levels over a small chroma, in float32.
        assert (ours - expected).abs().max() < 0.05, shift


def test_grayscale_equals_torchvisions(crops):
    ours = run(crops, choose(grayscale=True))
    assert (ours - F.rgb_to_grayscale(channels_first(crops), 3)).abs().max() < 0.05
    # Pillow rounds to the nearest integer.
    assert (ours - by_pillow(crops, [choose(grayscale=True)] * len(crops))).abs().max() < 0.51


# Levels by which Pillow differs at most and on average. Its blends cut the fraction off; its hue
# and saturation are rounded to 256 steps, and a step of hue is 6/256 of the chroma.
@pytest.mark.parametrize(
    ("jitter", "most", "average"),
    [
        ((0.6, 1.0, 1.0, 0.0), 1.01, 0.6),
        ((1.6, 1.0, 1.0, 0.0), 1.01, 0.6),
        ((1.0, 0.4, 1.0, 0.0), 1.5, 0.9),
        ((1.0, 1.7, 1.0, 0.0), 1.5, 0.9),
        ((1.0, 1.0, 0.3, 0.0), 1.5, 0.9),
        ((1.0, 1.0, 1.8, 0.0), 1.5, 0.9),
        ((1.0, 1.0, 1.0, 0.15), 12.0, 2.0),
        ((1.0, 1.0, 1.0, -0.2), 12.0, 2.0),
    ],
)
def test_an_adjustment_is_close_to_pillows(crops, jitter, most, average):
    chosen = [choose(jitter=jitter)] * len(crops)
    difference = (run(crops, *chosen) - by_pillow(crops, chosen)).abs()
    assert difference.max() < most
    assert difference.mean() < average


@pytest.mark.parametrize("radius", [0.1, 0.3, 0.5, 0.9, 1.3, 1.7, 2.0])
def test_blur_is_pillows(crops, radius):
    chosen = [choose(blur=radius)] * len(crops)
    difference = (run(crops, *chosen) - by_pillow(crops, chosen)).abs()
    # Inside, only Pillow's rounding after each of six box filters is left: half a level each.
    inside = difference[..., 6:-6, 6:-6]
    assert inside.max() < 3
    assert inside.mean() < 0.7
    assert difference.mean() < 0.7


def test_blur_has_the_variance_of_the_gaussian():
    impulse = torch.zeros(1, 33, 33, 3, dtype=torch.uint8)
    impulse[0, 16, 16] = 255
    place = torch.arange(33.0) - 16
    for radius in (0.1, 0.4, 1.0, 1.5, 2.0):
        row = run(impulse, choose(blur=radius))[0, 0].sum(0) / 255
        assert row.sum() == pytest.approx(1, abs=1e-4)
        assert (row * place**2).sum() == pytest.approx(radius**2, abs=2e-3)


def test_every_order_of_the_jitter_is_kept(crops):
    crop = crops[:1].expand(len(ORDERS), -1, -1, -1)
    chosen = [choose(jitter=(1.4, 0.5, 1.7, 0.15), order=order) for order in ORDERS]
    ours, expected = run(crop, *chosen), by_tensor(crop, chosen)
    assert (ours - expected).abs().max() < 0.1
    # The orders differ by far more than that.
    apart = (expected[:, None] - expected).abs().amax((2, 3, 4)) + 1e9 * torch.eye(len(ORDERS))
    assert apart.min() > 0.5


def test_the_whole_chain_equals_torchvisions(crops):
    many = crops.repeat(20, 1, 1, 1)
    sharp = random_parameters(len(many), blur_probability=0)
    difference = (run(many, *sharp) - by_tensor(many, sharp)).abs()
    # Contrast and saturation of up to 1.8 multiply what gray weights and rounding leave.
    assert difference.max() < 0.5
    chosen = random_parameters(len(many), seed=1)
    difference = (run(many, *chosen) - by_pillow(many, chosen)).abs()
    assert difference.mean() < 1.5  # levels: Pillow rounds down up to four times


def test_host_and_device_agree(crops):
    many = crops.repeat(10, 1, 1, 1)
    chosen = random_parameters(len(many), seed=2)
    host = [distort(pixels.numpy(), p) for pixels, p in zip(many, chosen, strict=True)]
    difference = run(many, *chosen) - channels_first(torch.from_numpy(np.stack(host)))
    assert difference.abs().mean() < 1.5
    assert abs(difference.mean()) < 1.0


def test_a_row_does_not_depend_on_the_others(crops):
    parameters = pack(random_parameters(len(crops)))
    together = distort_batch(crops, parameters)
    order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))
    shuffled = distort_batch(crops[order], parameters[order])
    assert torch.allclose(shuffled, together[order], atol=1e-5)
    for row in range(len(crops)):
        alone = distort_batch(crops[row : row + 1], parameters[row : row + 1])
        assert torch.allclose(alone[0], together[row], atol=1e-5)


def test_shapes_types_and_untouched_input(crops):
    before = crops.clone()
    parameters = pack(random_parameters(len(crops)))
    assert parameters.shape == (len(crops), COLUMNS)
    assert parameters.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        result = distort_batch(crops, parameters)
    assert result.shape == (len(crops), 3, SIDE, SIDE)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert torch.equal(crops, before)
    assert torch.allclose(result, distort_batch(crops, parameters), atol=1e-5)


def test_no_value_decides_what_is_computed(crops):
    """One graph without a break: on a GPU the host would never wait."""
    parameters = pack(random_parameters(len(crops)))
    compiled = torch.compile(distort_batch, fullgraph=True, backend="eager")
    expected = distort_batch(crops, parameters)
    assert torch.allclose(compiled(crops, parameters), expected, atol=1e-5)


def test_too_large_a_blur_is_refused():
    with pytest.raises(ValueError, match=r"blur 2.5 is outside 0 to 2.0"):
        pack([choose(blur=2.5)])


# ------------------------------------------------- distributions, each side with its own chance


def features(crops):
    """Per crop of 0 to 255 `[N, 3, s, s]`: what each operation shows in, as name -> `[N]`."""
    gray = crops.mean(1)
    found = {
        **{f"mean of {name}": crops[:, c].mean((1, 2)) for c, name in enumerate("rgb")},
        "contrast": gray.std((1, 2)),
        "chroma": (crops.amax(1) - crops.amin(1)).mean((1, 2)),
        "red against blue": (crops[:, 0] - crops[:, 2]).mean((1, 2)),
        "left against right": (gray[..., : SIDE // 2] - gray[..., SIDE // 2 :]).mean((1, 2)),
        "detail": gray.diff(dim=2).abs().mean((1, 2)),
    }
    # The chroma of a gray crop is 1e-6 in float32 and 0 in integers, which ranks would tell apart.
    return {name: values.round(decimals=2) for name, values in found.items()}


def published():
    """SwAV's released composition for one crop of the first resolution."""
    jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    rng = np.random.default_rng(1)

    def blur(image):
        if rng.random() < 0.5:
            return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
        return image

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, scale=(0.14, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            blur,
        ]
    )


@pytest.mark.parametrize("name", ["astronaut", "flower"])
def test_pixels_are_distributed_as_the_published_pipelines(name):
    count = 600
    image = load_photographs()[{"astronaut": 0, "flower": 14}[name]]
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    multi_crop = MultiCrop((SIDE,), (1,), ((0.14, 1.0),))
    pixels, chosen = [], []
    for index in range(count):
        crop, parameters = cut_crops(
            buffer.getvalue(), partial(multi_crop.draw, sample_rng(3, index))
        )
        pixels += crop
        chosen += parameters
    ours = features(levels(distort_batch(torch.from_numpy(np.stack(pixels)), pack(chosen))))
    torch.manual_seed(0)
    transform, decoded = published(), Image.open(buffer).convert("RGB")
    theirs = np.stack([np.asarray(transform(decoded)) for _ in range(count)])
    expected = features(channels_first(torch.from_numpy(theirs)))
    for feature in ours:
        assert ks_2samp(ours[feature], expected[feature]).pvalue > P_VALUE, feature


def test_a_shifted_distribution_would_be_noticed(crops):
    """The statistics have the power to tell a pipeline without blur, or with half the jitter."""
    many = crops[:1].repeat(600, 1, 1, 1)
    right = features(run(many, *random_parameters(600, seed=4)))
    for wrong, feature in (
        ({"blur_probability": 0.0}, "detail"),
        ({"color_distortion": 0.5}, "mean of r"),
        ({"color_distortion": 0.5}, "contrast"),
    ):
        other = features(run(many, *random_parameters(600, seed=5, **wrong)))
        assert ks_2samp(right[feature], other[feature]).pvalue < P_VALUE, feature
