"""The middle square of an image: what a trained trunk is shown, in tests and when it is served."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as V

from seer_scale.data.augment import normalise
from seer_scale.data.decode import decode

LONGEST = 8  # times the shorter side: what is longer is cut before it is resized
TEST_SHARE = 256 / 224  # shorter side of a test image over the side of its crop


@dataclass(frozen=True)
class MiddleCrop:
    """Middle square of an image whose shorter side is resized first.

    Attributes:
        size: side of the crop in pixels.
        resize: shorter side in pixels before the crop; None means 256/224 of `size`.
        bicubic: interpolate bicubically instead of bilinearly.
    """

    size: int
    resize: int | None = None
    bicubic: bool = False

    def __call__(self, data: bytes, position: int) -> Tensor:
        """Returns the normalised crop float32 [3, size, size] of an encoded image."""
        return self.cut(decode(data))

    def cut(self, image: Image.Image) -> Tensor:
        """Returns the normalised crop float32 [3, size, size] of a decoded image."""
        image = _cut_long(image)
        mode = V.InterpolationMode.BICUBIC if self.bicubic else V.InterpolationMode.BILINEAR
        resized = V.resize(image, self.resize or round(self.size * TEST_SHARE), mode)
        return normalise(torch.from_numpy(np.array(V.center_crop(resized, self.size))))


def _cut_long(image: Image.Image) -> Image.Image:
    """Returns the middle of a long image, in which its middle square lies with room to spare.

    Resized whole, an image of 1 x 60,000 pixels would take 17 GB.
    """
    most = LONGEST * min(image.size)
    left, top = (max(side - most, 0) // 2 for side in image.size)
    if not (left or top):
        return image
    return image.crop((left, top, image.width - left, image.height - top))
