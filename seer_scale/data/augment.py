"""SEER's multi-crop augmentation, split into drawing parameters and applying them.

SwAV (2006.09882, section 3.3 and appendix A.1) and SEER (2103.01988): random resized crop, flip,
colour jitter, grayscale, Gaussian blur, normalisation, drawn anew for every crop. Drawing and
applying are both pure, so that crops can be cut where the image is decoded and distorted elsewhere.
Pixels are close to torchvision's, whose import would triple the start of a loader process.
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

RATIO = (3 / 4, 4 / 3)
FLIP_PROBABILITY = 0.5
JITTER_PROBABILITY = 0.8
JITTER_STRENGTH = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue at distortion 1
GRAYSCALE_PROBABILITY = 0.2
BLUR_RADIUS = (0.1, 2.0)

_ORDERS = tuple(itertools.permutations(range(len(JITTER_STRENGTH))))
_ROUNDING = 0.4999  # just below a half, so that whole numbers stay what they are
_LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))
_BOX_ATTEMPTS = 10
_UNIFORMS = 10 + 2 * _BOX_ATTEMPTS + 2  # what one crop uses at most

Box = tuple[int, int, int, int]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CropParameters:
    """All random choices of one crop.

    Attributes:
        size: side of the crop in pixels.
        box: left, top, right, bottom in pixels of the image.
        flip: mirror left to right.
        jitter: factors of brightness, contrast, saturation and the shift of hue; None leaves the
            colours alone.
        jitter_order: order in which these four are applied.
        grayscale: drop the colours after the jitter.
        blur: radius of the Gaussian blur in pixels of the crop; 0 for none.
    """

    size: int
    box: Box
    flip: bool
    jitter: tuple[float, float, float, float] | None
    jitter_order: tuple[int, ...]
    grayscale: bool
    blur: float


def distort(crop: Pixels, parameters: CropParameters) -> Pixels:
    """Flip, colour jitter in its order, grayscale and blur of an RGB crop uint8 `[s, s, 3]`.

    Equals torchvision on Pillow images but for the rounding of hues and of the blur. The result
    may be the crop itself, which is never written to.
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
    """Away from, or towards, the mean gray."""
    mean = int(cv2.mean(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _blend(crop, factor, crop, 0.0, mean * (1 - factor))


def _adjust_saturation(crop: Pixels, factor: float) -> Pixels:
    """Away from, or towards, the gray image."""
    gray = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _blend(crop, factor, gray, 1 - factor, 0.0)


def _blend(first: Pixels, weight: float, second: Pixels, other: float, offset: float) -> Pixels:
    """Clipped and, as in Pillow, truncated; OpenCV itself rounds to nearest."""
    blended: Pixels = cv2.addWeighted(first, weight, second, other, offset - _ROUNDING)
    return blended


def _adjust_hue(crop: Pixels, shift: float) -> Pixels:
    """Turns the colour circle by `shift` of a full turn, here 256 steps."""
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(shift * 256) % 256)  # truncated as in torchvision; wraps around
    turned: Pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return turned


_ADJUSTMENTS = (_adjust_brightness, _adjust_contrast, _adjust_saturation, _adjust_hue)


def _blur_kernel(radius: float) -> NDArray[np.float32]:
    """Pillow's Gaussian of standard deviation `radius`: three box filters, as one kernel.

    Each box has a third of the variance. It covers the 2 n + 1 pixels nearest to its middle, and
    the next one on either side in part.
    """
    variance = radius**2 / 3
    n = int((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * n + 1) * (3 * variance - n * (n + 1)) / (6 * ((n + 1) ** 2 - variance))
    box = np.ones(2 * n + 3)
    box[0] = box[-1] = edge
    box /= box.sum()
    return np.convolve(np.convolve(box, box), box).astype(np.float32)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 `[..., size, size, 3]` to float32 `[..., 3, size, size]` of ImageNet's mean and std."""
    channels_first = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = _mean_and_std(pixels.device)
    return channels_first.div_(255).sub_(mean).div_(std)


@cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Once per device: bringing them over would hold up the host in every step."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return mean, std


class MultiCrop:
    """Turns an image into `counts[i]` crops of `sizes[i]` pixels for every resolution i.

    Args:
        sizes: side of the square crops in pixels, one per resolution.
        counts: crops per resolution.
        scales: smallest and largest share of the image's area, one pair per resolution.
        color_distortion: strength of the colour jitter; 1 is SimCLR's, SwAV's and SEER's.
        blur_probability: share of the crops that are blurred.

    Raises:
        ConfigError: lengths that differ, or a value outside its range.
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
        """Parameters of every crop of a `width` x `height` image, first resolution first."""
        crops = [
            (size, scale)
            for size, count, scale in zip(self.sizes, self.counts, self.scales, strict=True)
            for _ in range(count)
        ]
        # Always as many numbers per crop, so that one crop's draws never shift those of the next.
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
    """A box of random area and aspect ratio inside the image.

    Distributed as in torchvision's RandomResizedCrop: up to ten attempts, then the largest
    central box whose aspect ratio is allowed.
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
