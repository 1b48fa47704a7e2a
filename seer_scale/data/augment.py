"""SEER's multi-crop augmentation, split into drawing parameters and applying them.

SwAV (2006.09882, section 3.3 and appendix A.1) and SEER (2103.01988): random resized crop, flip,
colour jitter, grayscale, Gaussian blur, normalisation, drawn anew for every crop. Drawing and
applying are both pure, so that `cut` can run where the image is decoded and the rest elsewhere.
Pixels equal torchvision's, whose import would triple the start of a loader process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from seer_scale.errors import ConfigError
from seer_scale.preprocessing import MEAN, STD

RATIO = (3 / 4, 4 / 3)
FLIP_PROBABILITY = 0.5
JITTER_PROBABILITY = 0.8
JITTER_STRENGTH = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue at distortion 1
GRAYSCALE_PROBABILITY = 0.2
BLUR_RADIUS = (0.1, 2.0)

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_HUE = len(_ENHANCERS)  # the fourth adjustment
_ORDERS = tuple(itertools.permutations(range(_HUE + 1)))
_BOX_ATTEMPTS = 10
_UNIFORMS = 10 + 2 * _BOX_ATTEMPTS + 2  # what one crop uses at most

Box = tuple[int, int, int, int]


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


def cut(image: Image.Image, parameters: CropParameters) -> Image.Image:
    """Crops, resizes and flips: the geometric part."""
    size = (parameters.size, parameters.size)
    # Not `resize(box=...)`: near its edges that also looks at pixels outside the box.
    crop = image.crop(parameters.box).resize(size, Image.Resampling.BILINEAR)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if parameters.flip else crop


def distort(crop: Image.Image, parameters: CropParameters) -> Image.Image:
    """Colour jitter, grayscale and blur: the photometric part."""
    if parameters.jitter is not None:
        for which in parameters.jitter_order:
            amount = parameters.jitter[which]
            if which == _HUE:
                crop = _shift_hue(crop, amount)
            else:
                crop = _ENHANCERS[which](crop).enhance(amount)
    if parameters.grayscale:
        crop = crop.convert("L").convert("RGB")
    if parameters.blur:
        crop = crop.filter(ImageFilter.GaussianBlur(parameters.blur))
    return crop


def _shift_hue(crop: Image.Image, shift: float) -> Image.Image:
    """Turns the colour circle by `shift` of a full turn."""
    hue, saturation, value = crop.convert("HSV").split()
    steps = int(shift * 255)
    turned = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def normalise(pixels: Tensor) -> Tensor:
    """uint8 `[..., size, size, 3]` to float32 `[..., 3, size, size]` of ImageNet's mean and std."""
    channels_first = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return channels_first.div_(255).sub_(mean).div_(std)


def apply(image: Image.Image, parameters: CropParameters) -> Tensor:
    """One finished crop `[3, size, size]`."""
    crop = distort(cut(image, parameters), parameters)
    return normalise(torch.from_numpy(np.array(crop)))


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
            self._draw_crop(iter(row), size, scale, width, height)
            for (size, scale), row in zip(crops, uniforms, strict=True)
        ]

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> list[Tensor]:
        """One tensor `[count, 3, size, size]` per resolution."""
        parameters = iter(self.draw(rng, image.width, image.height))
        resolutions = []
        for size, count in zip(self.sizes, self.counts, strict=True):
            pixels = np.empty((count, size, size, 3), np.uint8)
            for crop, chosen in zip(pixels, parameters, strict=False):
                crop[:] = np.asarray(distort(cut(image, chosen), chosen))
            resolutions.append(normalise(torch.from_numpy(pixels)))
        return resolutions

    def _draw_crop(
        self,
        uniform: Iterator[float],
        size: int,
        scale: tuple[float, float],
        width: int,
        height: int,
    ) -> CropParameters:
        flip = next(uniform) < FLIP_PROBABILITY
        jittered = next(uniform) < JITTER_PROBABILITY and self.color_distortion > 0
        jitter_order = _ORDERS[int(next(uniform) * len(_ORDERS))]
        spans = [self.color_distortion * strength for strength in JITTER_STRENGTH]
        brightness, contrast, saturation = (
            _between(next(uniform), max(0.0, 1 - span), 1 + span) for span in spans[:3]
        )
        hue = _between(next(uniform), -spans[3], spans[3])
        grayscale = next(uniform) < GRAYSCALE_PROBABILITY
        blurred = next(uniform) < self.blur_probability
        radius = _between(next(uniform), *BLUR_RADIUS)
        return CropParameters(
            size=size,
            box=_draw_box(uniform, scale, width, height),
            flip=flip,
            jitter=(brightness, contrast, saturation, hue) if jittered else None,
            jitter_order=jitter_order,
            grayscale=grayscale,
            blur=radius if blurred else 0.0,
        )


def _between(uniform: float, low: float, high: float) -> float:
    return low + (high - low) * uniform


def _draw_box(uniform: Iterator[float], scale: tuple[float, float], width: int, height: int) -> Box:
    """A box of random area and aspect ratio inside the image.

    Distributed as in torchvision's RandomResizedCrop: up to ten attempts, then the largest
    central box whose aspect ratio is allowed.
    """
    log_ratio = (math.log(RATIO[0]), math.log(RATIO[1]))
    for _ in range(_BOX_ATTEMPTS):
        area = width * height * _between(next(uniform), *scale)
        ratio = math.exp(_between(next(uniform), *log_ratio))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(next(uniform) * (width - box_width + 1))
            top = int(next(uniform) * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    box_width, box_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height
