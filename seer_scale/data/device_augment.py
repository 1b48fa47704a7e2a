"""The photometric half of the augmentation for a batch at once, on the device of the crops.

The same operations as `augment.distort`, with per-sample parameters as columns of one tensor: flip,
colour jitter in every sample's own order, grayscale, Gaussian blur, normalisation. Nothing depends
on the values, so that the host never waits for the device and the batch may be compiled.

Values stay float32 in 0 to 255 and are clamped after every operation, as torchvision does with
float tensors. Pillow also rounds to integers after each; that is the whole difference to it, but
for hue, which Pillow keeps in 256 steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_scale.data.augment import BLUR_RADIUS, CropParameters
from seer_scale.preprocessing import MEAN, STD

# Columns of the packed parameters.
FLIP, GRAYSCALE, BLUR = 0, 9, 10
FACTORS = slice(1, 5)  # of brightness, contrast, saturation; the shift of hue
ORDER = slice(5, 9)  # which of these four comes first, second, ...
COLUMNS = 11

_CONTRAST, _SATURATION, _HUE = 1, 2, 3
_UNCHANGED = (1.0, 1.0, 1.0, 0.0)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L
# Where red, green and blue stand on the colour circle, in turns: see `_shift_hue_`.
_PHASES = (5 / 6, 3 / 6, 1 / 6)
_BOXES = 3  # passes of a box filter that stand for a Gaussian in Pillow


def pack(parameters: Sequence[CropParameters]) -> Tensor:
    """One row of float32 per crop, `[N, COLUMNS]`, in the host's memory.

    A crop without jitter gets factors that change nothing.

    Raises:
        ValueError: a blur beyond the largest radius that `distort_batch` has room for.
    """
    rows = []
    for crop in parameters:
        if not 0 <= crop.blur <= BLUR_RADIUS[1]:
            raise ValueError(f"blur {crop.blur} is outside 0 to {BLUR_RADIUS[1]}")
        jitter = crop.jitter or _UNCHANGED
        rows.append((crop.flip, *jitter, *crop.jitter_order, crop.grayscale, crop.blur))
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), COLUMNS)


def distort_batch(crops: Tensor, parameters: Tensor) -> Tensor:
    """Distorts and normalises crops of one size.

    Args:
        crops: uint8 `[N, size, size, 3]`.
        parameters: rows of `pack`, `[N, COLUMNS]`, on the same device.

    Returns:
        float32 `[N, 3, size, size]`, of ImageNet's mean and standard deviation. A row depends on
        no other row; its last bits may depend on how many there are.
    """
    flip = parameters[:, FLIP].view(-1, 1, 1, 1) > 0
    upright = torch.where(flip, crops.flip(2), crops)
    pixels = upright.movedim(-1, 1).to(torch.float32, memory_format=torch.contiguous_format)
    _jitter_(pixels, parameters)
    gray = parameters[:, GRAYSCALE]
    _blend_(pixels, 1 - gray, gray, torch.zeros_like(gray))
    with torch.autocast(crops.device.type, enabled=False):
        pixels = _blur(pixels, parameters[:, BLUR])
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        pixels[:, channel].sub_(255 * mean).div_(255 * std)
    return pixels


def _jitter_(pixels: Tensor, parameters: Tensor) -> None:
    """The four adjustments, in the order of each sample.

    Hue costs as much as all others, so it is done once for everybody: first what comes before it
    in a sample's order, then hue, then what comes after.
    """
    order = parameters[:, ORDER].long()
    factors = parameters[:, FACTORS]
    hue = order == _HUE
    before = hue.cumsum(1) == 0
    _adjust_(pixels, factors, order, before, places=(0, 1, 2))
    _shift_hue_(pixels, factors[:, _HUE])
    _adjust_(pixels, factors, order, ~before & ~hue, places=(1, 2, 3))


def _adjust_(
    pixels: Tensor, factors: Tensor, order: Tensor, concerned: Tensor, places: Sequence[int]
) -> None:
    """Brightness, contrast, saturation at `places` of `order`, where `concerned`; all `[N, 4]`."""
    keep = torch.where(concerned, factors.gather(1, order), 1.0)
    of_gray = (1 - keep) * (order == _SATURATION)
    of_mean = (1 - keep) * (order == _CONTRAST)
    for place in places:
        _blend_(pixels, keep[:, place], of_gray[:, place], of_mean[:, place])


def _blend_(pixels: Tensor, keep: Tensor, of_gray: Tensor, of_mean: Tensor) -> None:
    """`pixels * keep + gray * of_gray + mean(gray) * of_mean`, clamped; three factors `[N]`.

    Brightness blends with black, saturation with the gray image, contrast with its mean.
    """
    gray = _gray(pixels)
    mean = gray.mean((1, 2))
    gray.mul_(_per_row(of_gray)).add_(_per_row(of_mean * mean))
    pixels.mul_(_per_row(keep).unsqueeze(1)).add_(gray.unsqueeze(1)).clamp_(0, 255)


def _gray(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _shift_hue_(pixels: Tensor, shift: Tensor) -> None:
    """Turns the colour circle by `shift` `[N]` of a full turn.

    In HSV, with value V, chroma C = V - minimum and hue h in turns, a channel of phase p is
    V - C * clamp(min(k, 4 - k), 0, 1) where k = 6 h + 6 p modulo 6.
    """
    red, green, blue = pixels.unbind(1)
    value = torch.maximum(red, green).maximum(blue)
    chroma = value - torch.minimum(red, green).minimum(blue)
    # A gray pixel has no hue: chroma 0 cancels whatever comes out.
    inverse = chroma.clamp(min=1e-6).reciprocal_()
    sixths = torch.where(
        value == red,
        (green - blue).mul_(inverse),
        torch.where(
            value == green,
            (blue - red).mul_(inverse).add_(2),
            (red - green).mul_(inverse).add_(4),
        ),
    )
    turns = sixths.div_(6).add_(_per_row(shift + 1))  # + 1: `frac` wants it positive
    base = value.sub_(chroma, alpha=2)
    for channel, phase in enumerate(_PHASES):
        k = (turns + phase).frac_().mul_(6)
        # min(k, 4 - k) is 2 - |k - 2|
        pixels[:, channel] = k.sub_(2).abs_().clamp_(1, 2).mul_(chroma).add_(base)


def _blur(pixels: Tensor, radius: Tensor) -> Tensor:
    """Gaussian blur of `radius` `[N]` pixels, 0 for none, by Pillow's kernel.

    Pillow runs a box filter three times over rows and columns; here the three are one kernel.
    Beyond the border the outermost pixel is repeated, once instead of before each of the three.
    """
    kernel = _kernel(radius)
    count, channels, height, width = pixels.shape
    groups, taps = count * channels, kernel.shape[1]
    weights = kernel.repeat_interleave(channels, 0)
    along_rows, along_columns = (taps // 2, taps // 2, 0, 0), (0, 0, taps // 2, taps // 2)
    padded = F.pad(pixels, along_rows, mode="replicate").view(1, groups, height, -1)
    rows = F.conv2d(padded, weights.view(groups, 1, 1, taps), groups=groups)
    padded = F.pad(rows, along_columns, mode="replicate").view(1, groups, -1, width)
    blurred = F.conv2d(padded, weights.view(groups, 1, taps, 1), groups=groups)
    return blurred.view(count, channels, height, width)


def _kernel(radius: Tensor) -> Tensor:
    """Weights `[N, taps]` of three box filters in a row that have the variance of the Gaussian.

    A box of radius b weighs pixels at distance d by clamp(b + 1 - d, 0, 1), as Gwosdek et al.,
    "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering" (2011).
    """
    variance = radius.square() / _BOXES
    whole = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    box = whole + part / (6 * (variance - (whole + 1).square()))
    reach = _box_reach(BLUR_RADIUS[1])
    distance = torch.arange(-reach, reach + 1, device=radius.device).abs()
    weights = (box.unsqueeze(1) + 1 - distance).clamp(0, 1) / (2 * box + 1).unsqueeze(1)
    kernel = weights.unsqueeze(0)
    for _ in range(_BOXES - 1):
        kernel = F.conv1d(kernel, weights.unsqueeze(1), padding=2 * reach, groups=len(radius))
    return kernel.squeeze(0)


def _box_reach(radius: float) -> int:
    """Pixels to each side that a box filter for `radius` touches."""
    return math.floor((math.sqrt(12 * radius**2 / _BOXES + 1) - 1) / 2) + 1


def _per_row(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)
