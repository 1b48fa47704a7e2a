"""The photometric half of the augmentation, for a whole batch on the device of the crops.

The operations are those of `augment.distort`: flip, colour jitter in each sample's own order,
grayscale, Gaussian blur, normalisation. The parameters are columns of one tensor. The control flow
does not depend on values, so the host never waits for the device and the batch can be compiled.

Values are whole numbers from 0 to 255 in float32. Brightness, contrast and saturation cut the
fraction off as Pillow does, and gray is Pillow's: without the cut, images would be half a level
brighter per adjustment than those of the host. Hue is rounded, where Pillow keeps it in 256 steps.
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
FACTORS = slice(1, 5)  # factors of brightness, contrast, saturation; the shift of hue
ORDER = slice(5, 9)  # the numbers of these four in the order of their application
COLUMNS = 11

_CONTRAST, _SATURATION, _HUE = 1, 2, 3
_UNCHANGED = (1.0, 1.0, 1.0, 0.0)
# ITU-R BT.601 in 65536ths, as Pillow's mode L. The sums are below 2**24, so exact in float32.
_LUMA, _ONE = (19595, 38470, 7471), 65536
# Phases of red, green and blue on the colour circle, in turns: see `_shift_hue_`.
_PHASES = (5 / 6, 3 / 6, 1 / 6)
_BOXES = 3  # box filters by which Pillow approximates a Gaussian


def pack(parameters: Sequence[CropParameters]) -> Tensor:
    """Packs the parameters of N crops into a tensor float32 [N, COLUMNS] on the host.

    A crop without jitter gets factors that change nothing.

    Raises:
        ValueError: a blur exceeds the largest radius of `distort_batch`.
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
        crops: uint8 [N, size, size, 3].
        parameters: rows of `pack`, float32 [N, COLUMNS], on the device of the crops.

    Returns:
        float32 [N, 3, size, size], normalised by ImageNet's mean and standard deviation. Each row
        is independent of the others, except that its last bits may depend on N.
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
    """Applies the four adjustments in place, in the order of each sample.

    Hue costs as much as the other three together, so it is computed once for all samples: first the
    adjustments before hue in each sample's order, then hue, then the rest.
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
    """Applies brightness, contrast and saturation at `places`, where `concerned`; all [N, 4]."""
    keep = torch.where(concerned, factors.gather(1, order), 1.0)
    with_gray = (order == _SATURATION).float()
    with_mean = (order == _CONTRAST).float()
    for place in places:
        _blend_(pixels, keep[:, place], with_gray[:, place], with_mean[:, place])


def _blend_(pixels: Tensor, keep: Tensor, with_gray: Tensor, with_mean: Tensor) -> None:
    """Computes `other + keep * (pixels - other)` in place, clamps, and cuts the fraction off.

    The three factors are [N]. `other` is the gray image where `with_gray` is 1 (saturation), its
    mean where `with_mean` is 1 (contrast), and else black (brightness). With `keep` 1 whole numbers
    stay as they are.
    """
    gray = _gray(pixels)
    mean = gray.mean((1, 2)).add_(0.5).floor_()
    other = gray.mul_(_per_row(with_gray)).add_(_per_row(with_mean * mean)).unsqueeze(1)
    pixels.sub_(other).mul_(_per_row(keep).unsqueeze(1)).add_(other).clamp_(0, 255).floor_()


def _gray(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.unbind(1)
    sums = (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return sums.add_(_ONE // 2).mul_(1 / _ONE).floor_()


def _shift_hue_(pixels: Tensor, shift: Tensor) -> None:
    """Rotates the hue of each sample by `shift` [N] of a full turn, in place; rounds.

    In HSV, with value V, chroma C = V - minimum and hue h in turns, a channel of phase p is
    V - C * clamp(min(k, 4 - k), 0, 1) where k = 6 h + 6 p modulo 6.
    """
    red, green, blue = pixels.unbind(1)
    value = torch.maximum(red, green).maximum(blue)
    chroma = value - torch.minimum(red, green).minimum(blue)
    # A gray pixel has no hue: its chroma of 0 cancels the result.
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
    turns = sixths.div_(6).add_(_per_row(shift + 1))  # + 1: `frac` needs positive values
    base = value.sub_(chroma, alpha=2)
    for channel, phase in enumerate(_PHASES):
        k = (turns + phase).frac_().mul_(6)
        # min(k, 4 - k) is 2 - |k - 2|
        pixels[:, channel] = k.sub_(2).abs_().clamp_(1, 2).mul_(chroma).add_(base).round_()


def _blur(pixels: Tensor, radius: Tensor) -> Tensor:
    """Blurs each sample by a Gaussian of `radius` [N] pixels (0: no blur), with Pillow's kernel.

    Pillow runs three box filters over rows and columns; here the three are one kernel. Border
    pixels are repeated once, not before each of the three filters.
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
    """Returns kernels [N, taps] of three box filters in a row, with the variance of the Gaussian.

    A box of radius b weighs pixels at distance d by clamp(b + 1 - d, 0, 1): Gwosdek et al.,
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
    """Returns the pixels to each side that a box filter for `radius` touches."""
    return math.floor((math.sqrt(12 * radius**2 / _BOXES + 1) - 1) / 2) + 1


def _per_row(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)
