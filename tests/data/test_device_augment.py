"""Augmentation in batch against torchvision's, operation by operation and as a whole."""

from __future__ import annotations

import io
import itertools
from functools import partial
from typing import Any

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
def crops() -> Any:
    """One square per photograph, uint8 `[15, SIDE, SIDE, 3]`."""
    pixels = []
    for image in load_photographs():
        side = min(image.size)
        square = image.crop((0, 0, side, side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels.append(np.asarray(square))
    return torch.from_numpy(np.stack(pixels))


def choose(
    flip: Any = False,
    jitter: Any = None,
    order: Any = (0, 1, 2, 3),
    grayscale: Any = False,
    blur: Any = 0.0,
) -> Any:
    return CropParameters(SIDE, (0, 0, 1, 1), flip, jitter, order, grayscale, blur)


def levels(normalised: Any) -> Any:
    """Back to 0 to 255, `[N, 3, s, s]`."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (normalised * std + mean) * 255


def run(crops: Any, *parameters: Any) -> Any:
    """The same crops with the same parameters each, or with their own."""
    chosen = list(parameters) * len(crops) if len(parameters) == 1 else list(parameters)
    return levels(distort_batch(crops, pack(chosen)))


def channels_first(crops: Any) -> Any:
    return crops.movedim(-1, 1).float()


def adjust(image: Any, which: int, value: float) -> Any:
    """Pillow's adjustment of an image; hue by torchvision in float32, rounded to whole levels."""
    if which < 3:
        return ADJUST[which](image, value)
    pixels = torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0).float() / 255
    turned = (F.adjust_hue(pixels, value) * 255).round().byte()
    return Image.fromarray(turned.movedim(0, -1).numpy())


def with_fine_hue(crops: Any, parameters: Any) -> Any:
    """Pillow's operations without its coarse hue, on one image at a time, in 0 to 255."""
    images = []
    for pixels, p in zip(crops, parameters, strict=True):
        image = Image.fromarray(pixels.numpy())
        image = F.horizontal_flip(image) if p.flip else image
        for which in p.jitter_order if p.jitter else ():
            image = adjust(image, which, p.jitter[which])
        image = F.to_grayscale(image, 3) if p.grayscale else image
        images.append(np.asarray(image))
    return channels_first(torch.from_numpy(np.stack(images)))


def by_pillow(crops: Any, parameters: Any) -> Any:
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


def random_parameters(count: Any, seed: Any = 0, **fixed: Any) -> Any:
    """As a training draws them."""
    multi_crop = MultiCrop((SIDE,), (count,), ((0.14, 1.0),), **fixed)
    return multi_crop.draw(sample_rng(seed, 0), 640, 480)


def test_nothing_chosen_changes_nothing(crops: Any) -> None:
    assert torch.allclose(run(crops, choose()), channels_first(crops), atol=1e-3)


def test_flip_mirrors_the_columns(crops: Any) -> None:
    assert torch.allclose(run(crops, choose(flip=True)), channels_first(crops).flip(3), atol=1e-3)


# Up to a rounding of float32 at a whole number, which the cut makes a level.
@pytest.mark.parametrize("which", range(4), ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("strength", [0.0, 0.2, 0.7, 1.0, 1.3, 1.8])
def test_an_adjustment_is_rounded_as_pillows(crops: Any, which: Any, strength: Any) -> None:
    jitter = list(NEUTRAL)
    jitter[which] = strength if which < 3 else (strength - 0.9) * 0.2
    chosen = [choose(jitter=tuple(jitter))] * len(crops)
    difference = run(crops, *chosen) - with_fine_hue(crops, chosen)
    assert difference.abs().max() < 1.01
    assert difference.abs().mean() < 2e-3


def test_hue_of_every_colour_equals_torchvisions() -> None:
    """Ties of channels, gray, black and white among them."""
    steps = torch.tensor([0, 1, 63, 64, 127, 128, 192, 254, 255], dtype=torch.uint8)
    colours = torch.cartesian_prod(steps, steps, steps).view(1, 27, 27, 3)
    for shift in (-0.5, -0.21, -1e-3, 0.0, 1 / 6, 0.2, 0.5):
        ours = run(colours, choose(jitter=(1.0, 1.0, 1.0, shift)))
        expected = F.adjust_hue(channels_first(colours) / 255, shift) * 255
        # Half a level of rounding, and a difference of two large levels over a small chroma.
        assert (ours - expected).abs().max() < 0.55, shift


def test_grayscale_is_pillows(crops: Any) -> None:
    chosen = [choose(grayscale=True)] * len(crops)
    assert (run(crops, *chosen) - by_pillow(crops, chosen)).abs().max() < 1e-3


# Levels: a step of Pillow's hue is 6/256 of the chroma.
@pytest.mark.parametrize("shift", [0.15, -0.2])
def test_hue_is_close_to_pillows(crops: Any, shift: float) -> None:
    chosen = [choose(jitter=(1.0, 1.0, 1.0, shift))] * len(crops)
    difference = (run(crops, *chosen) - by_pillow(crops, chosen)).abs()
    assert difference.max() < 12
    assert difference.mean() < 2


@pytest.mark.parametrize("radius", [0.1, 0.3, 0.5, 0.9, 1.3, 1.7, 2.0])
def test_blur_is_pillows(crops: Any, radius: Any) -> None:
    chosen = [choose(blur=radius)] * len(crops)
    difference = (run(crops, *chosen) - by_pillow(crops, chosen)).abs()
    # Inside, only Pillow's rounding after each of six box filters is left: half a level each.
    inside = difference[..., 6:-6, 6:-6]
    assert inside.max() < 3
    assert inside.mean() < 0.7
    assert difference.mean() < 0.7


def test_blur_has_the_variance_of_the_gaussian() -> None:
    impulse = torch.zeros(1, 33, 33, 3, dtype=torch.uint8)
    impulse[0, 16, 16] = 255
    place = torch.arange(33.0) - 16
    for radius in (0.1, 0.4, 1.0, 1.5, 2.0):
        row = run(impulse, choose(blur=radius))[0, 0].sum(0) / 255
        assert row.sum() == pytest.approx(1, abs=1e-4)
        assert (row * place**2).sum() == pytest.approx(radius**2, abs=2e-3)


def test_every_order_of_the_jitter_is_kept(crops: Any) -> None:
    crop = crops[:1].expand(len(ORDERS), -1, -1, -1)
    chosen = [choose(jitter=(1.4, 0.5, 1.7, 0.16), order=order) for order in ORDERS]
    ours, expected = run(crop, *chosen), with_fine_hue(crop, chosen)
    assert (ours - expected).abs().mean() < 5e-2
    # The orders differ by far more than that.
    apart = (expected[:, None] - expected).abs().mean((2, 3, 4)) + 1e9 * torch.eye(len(ORDERS))
    assert apart.min() > 5e-2


def test_the_whole_chain_equals_torchvisions(crops: Any) -> None:
    many = crops.repeat(20, 1, 1, 1)
    sharp = random_parameters(len(many), blur_probability=0)
    difference = run(many, *sharp) - with_fine_hue(many, sharp)
    assert difference.abs().mean() < 5e-3
    chosen = random_parameters(len(many), seed=1)
    difference = run(many, *chosen) - by_pillow(many, chosen)
    assert difference.abs().mean() < 1.0  # levels, by Pillow's hue
    assert abs(difference.mean()) < 0.1


def test_host_and_device_agree(crops: Any) -> None:
    many = crops.repeat(10, 1, 1, 1)
    chosen = random_parameters(len(many), seed=2)
    host = [distort(pixels.numpy(), p) for pixels, p in zip(many, chosen, strict=True)]
    difference = run(many, *chosen) - channels_first(torch.from_numpy(np.stack(host)))
    assert difference.abs().mean() < 1.0
    assert abs(difference.mean()) < 0.2  # levels: neither is brighter than the other


def test_a_row_does_not_depend_on_the_others(crops: Any) -> None:
    parameters = pack(random_parameters(len(crops)))
    together = distort_batch(crops, parameters)
    order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))
    shuffled = distort_batch(crops[order], parameters[order])
    assert torch.allclose(shuffled, together[order], atol=1e-5)
    for row in range(len(crops)):
        alone = distort_batch(crops[row : row + 1], parameters[row : row + 1])
        assert torch.allclose(alone[0], together[row], atol=1e-5)


def test_shapes_types_and_untouched_input(crops: Any) -> None:
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


def test_no_value_decides_what_is_computed(crops: Any) -> None:
    """One graph without a break: on a GPU the host would never wait."""
    parameters = pack(random_parameters(len(crops)))
    compiled = torch.compile(distort_batch, fullgraph=True, backend="eager")
    expected = distort_batch(crops, parameters)
    assert torch.allclose(compiled(crops, parameters), expected, atol=1e-5)


def test_too_large_a_blur_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blur 2.5 is outside 0 to 2.0"):
        pack([choose(blur=2.5)])


# ------------------------------------------------- distributions, each side with its own chance


def features(crops: Any) -> Any:
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


def published() -> Any:
    """SwAV's released composition for one crop of the first resolution."""
    jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    rng = np.random.default_rng(1)

    def blur(image: Any) -> Any:
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
def test_pixels_are_distributed_as_the_published_pipelines(name: Any) -> None:
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


def test_a_shifted_distribution_would_be_noticed(crops: Any) -> None:
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
