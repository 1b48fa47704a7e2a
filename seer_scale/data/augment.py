"""SEER's multi-crop augmentation, split into drawing parameters and applying them.

Multi-crop: SwAV (Caron et al. 2020, arXiv 2006.09882, section 3.3 and appendix A.1), used by SEER
(arXiv 2103.01988). Each crop gets its own random resized crop, flip, colour jitter, grayscale and
Gaussian blur, then normalisation. Drawing and applying are pure functions, so that one process can
cut the crops and another device can distort them. The results are close to torchvision's; importing
torchvision would triple the start time of a loader process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seer_scale.errors import ConfigError
from seer_scale.preprocessing import MEAN, STD

RATIO = (3 / 4, 4 / 3)  # aspect ratios of the boxes, as in torchvision's RandomResizedCrop
FLIP_PROBABILITY = 0.5
JITTER_PROBABILITY = 0.8
JITTER_STRENGTH = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue at distortion 1
GRAYSCALE_PROBABILITY = 0.2
BLUR_RADIUS = (0.1, 2.0)  # standard deviation in pixels of the crop

_ORDERS = tuple(itertools.permutations(range(len(JITTER_STRENGTH))))
_ROUNDING = 0.4999  # just below 0.5, so that whole numbers do not change
_LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))
_BOX_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop
_UNIFORMS = 10 + 2 * _BOX_ATTEMPTS + 2  # most random numbers that one crop uses

Box = tuple[int, int, int, int]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CropParameters:
    """All random choices of one crop.

    Attributes:
        size: side of the crop in pixels.
        box: left, top, right, bottom in pixels of the image.
        flip: whether to mirror left to right.
        jitter: factors of brightness, contrast and saturation, and the shift of hue in turns; None
            if the colours do not change.
        jitter_order: order in which these four are applied.
        grayscale: whether to drop the colours after the jitter.
        blur: standard deviation of the Gaussian blur in pixels of the crop; 0 for no blur.
    """

    size: int
    box: Box
    flip: bool
    jitter: tuple[float, float, float, float] | None
    jitter_order: tuple[int, ...]
    grayscale: bool
    blur: float


def distort(crop: Pixels, parameters: CropParameters) -> Pixels:
    """Flips, jitters, grays and blurs an RGB crop uint8 [size, size, 3].

    The result equals torchvision's on Pillow images, except for the rounding of hue and blur. The
    input is never written to; if nothing changes, the result is the input itself.
    """
    if parameters.flip:
        crop = cv2.flip(crop, 1)
    if parameters.jitter is not None:
        for which in parameters.jitter_order:
            crop = _ADJUSTMENTS[which](crop, parameters.jitter[which])
    if parameters.grayscale:
        crop = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    if parameters.blur:
        kernel = _blur_kernel(parameters.blur)
        crop = cv2.sepFilter2D(crop, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return cv2.cvtColor(crop, cv2.COLOR_GRAY2RGB) if parameters.grayscale else crop


def _adjust_brightness(crop: Pixels, factor: float) -> Pixels:
    return _blend(crop, factor, crop, 0.0, 0.0)


def _adjust_contrast(crop: Pixels, factor: float) -> Pixels:
    """Blends with the mean gray level."""
    mean = int(cv2.mean(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _blend(crop, factor, crop, 0.0, mean * (1 - factor))


def _adjust_saturation(crop: Pixels, factor: float) -> Pixels:
    """Blends with the gray image."""
    gray = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _blend(crop, factor, gray, 1 - factor, 0.0)


def _blend(first: Pixels, weight: float, second: Pixels, other: float, offset: float) -> Pixels:
    """Adds weighted images, clips, and truncates as Pillow does; OpenCV alone would round."""
    blended: Pixels = cv2.addWeighted(first, weight, second, other, offset - _ROUNDING)
    return blended


def _adjust_hue(crop: Pixels, shift: float) -> Pixels:
    """Rotates the hue by `shift` of a full turn, in steps of 1/256."""
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(shift * 256) % 256)  # truncated as in torchvision; wraps around
    turned: Pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return turned


_ADJUSTMENTS = (_adjust_brightness, _adjust_contrast, _adjust_saturation, _adjust_hue)


def _blur_kernel(radius: float) -> NDArray[np.float32]:
    """Returns Pillow's Gaussian of standard deviation `radius`: three box filters as one kernel.

    Gwosdek et al., "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering"
    (2011). Each box has a third of the variance. It covers the 2 n + 1 pixels around its middle,
    and part of the next one on either side.
    """
    variance = radius**2 / 3
    n = int((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * n + 1) * (3 * variance - n * (n + 1)) / (6 * ((n + 1) ** 2 - variance))
    box = np.ones(2 * n + 3)
    box[0] = box[-1] = edge
    box /= box.sum()
    return np.convolve(np.convolve(box, box), box).astype(np.float32)


def normalise(pixels: Tensor) -> Tensor:
    """Normalises crops by ImageNet's mean and standard deviation.

    Takes uint8 [..., size, size, 3] and returns float32 [..., 3, size, size].
    """
    channels_first = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = _mean_and_std(pixels.device)
    return channels_first.div_(255).sub_(mean).div_(std)


@cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Copies mean and std to a device once; a copy in every step would make the host wait."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return mean, std


class MultiCrop:
    """Draws `counts[i]` crops of `sizes[i]` pixels for every resolution i of an image.

    Args:
        sizes: side of the square crops in pixels, one per resolution.
        counts: number of crops, one per resolution.
        scales: smallest and largest share of the image's area, one pair per resolution.
        color_distortion: strength of the colour jitter; 1 as in SimCLR, SwAV and SEER.
        blur_probability: share of the crops that are blurred.

    Raises:
        ConfigError: the lengths differ, or a value is outside its range.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        counts: Sequence[int],
        scales: Sequence[tuple[float, float]] = ((0.14, 1.0), (0.05, 0.14)),
        color_distortion: float = 1.0,
        blur_probability: float = 0.5,
    ) -> None:
        if not len(sizes) == len(counts) == len(scales):
            raise ConfigError(
                f"data.crop_sizes, data.crop_counts and data.crop_scales need one entry per"
                f" resolution, but have {len(sizes)}, {len(counts)} and {len(scales)}"
            )
        for scale in scales:
            if not 0 < scale[0] <= scale[1] <= 1:
                raise ConfigError(
                    f"data.crop_scales has {list(scale)}: the smallest and the largest share of"
                    " the image's area must satisfy 0 < smallest <= largest <= 1"
                )
        strongest = 0.5 / JITTER_STRENGTH[3]
        if not 0 <= color_distortion <= strongest:
            raise ConfigError(
                f"data.color_distortion={color_distortion} is outside 0 to {strongest:g}: beyond"
                " that the hue would turn more than half a circle"
            )
        self.sizes, self.counts, self.scales = tuple(sizes), tuple(counts), tuple(scales)
        self.color_distortion = color_distortion
        self.blur_probability = blur_probability
        spans = [color_distortion * strength for strength in JITTER_STRENGTH]
        self._ranges = [(max(0.0, 1 - span), 1 + span) for span in spans[:3]]
        self._ranges.append((-spans[3], spans[3]))

    def draw(self, rng: np.random.Generator, width: int, height: int) -> list[CropParameters]:
        """Draws the parameters of all crops of an image of `width` x `height` pixels."""
        crops = [
            (size, scale)
            for size, count, scale in zip(self.sizes, self.counts, self.scales, strict=True)
            for _ in range(count)
        ]
        # Each crop takes the same number of draws, so that crops do not influence each other.
        uniforms = rng.random((len(crops), _UNIFORMS)).tolist()
        return [
            self._draw_crop(row, size, scale, width, height)
            for (size, scale), row in zip(crops, uniforms, strict=True)
        ]

    def _draw_crop(
        self,
        uniform: list[float],
        size: int,
        scale: tuple[float, float],
        width: int,
        height: int,
    ) -> CropParameters:
        flip, jitter, order, bright, contrast, saturation, hue, gray, blur, radius = uniform[:10]
        factors = (
            _within(self._ranges[0], bright),
            _within(self._ranges[1], contrast),
            _within(self._ranges[2], saturation),
            _within(self._ranges[3], hue),
        )
        jittered = jitter < JITTER_PROBABILITY and self.color_distortion > 0
        return CropParameters(
            size=size,
            box=_draw_box(uniform[10:], scale, width, height),
            flip=flip < FLIP_PROBABILITY,
            jitter=factors if jittered else None,
            jitter_order=_ORDERS[int(order * len(_ORDERS))],
            grayscale=gray < GRAYSCALE_PROBABILITY,
            blur=_within(BLUR_RADIUS, radius) if blur < self.blur_probability else 0.0,
        )


def _within(limits: tuple[float, float], uniform: float) -> float:
    low, high = limits
    return low + (high - low) * uniform


def _draw_box(uniform: list[float], scale: tuple[float, float], width: int, height: int) -> Box:
    """Draws a box of random area and aspect ratio inside the image.

    The distribution is that of torchvision's RandomResizedCrop: up to ten attempts, then the
    largest central box with an allowed aspect ratio.
    """
    for first in range(0, 2 * _BOX_ATTEMPTS, 2):
        area = width * height * _within(scale, uniform[first])
        ratio = math.exp(_within(_LOG_RATIO, uniform[first + 1]))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(uniform[first + 2] * (width - box_width + 1))
            top = int(uniform[first + 3] * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    box_width, box_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height
