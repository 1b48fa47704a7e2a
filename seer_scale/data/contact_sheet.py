"""What `inspect` shows of a collection: its sizes, its bad files, and crops as the model sees them.

A contact sheet has a row per image: the whole image, then its crops after the distortion with the
parameters that were drawn, from the seed and the image's number.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont
from PIL.ImageFont import ImageFont as BitmapFont

from seer_scale.data.augment import CropParameters, MultiCrop, distort
from seer_scale.data.crops import cut_crops
from seer_scale.data.decode import BadImage, cause_of, decode
from seer_scale.data.order import sample_rng
from seer_scale.data.sources import Source

_MARGIN, _LINE, _FONT_SIZE = 8, 13, 11
_THUMBNAIL, _NARROWEST = 200, 132  # pixels; the latter is what a line of text takes
_INK, _PAPER, _FAINT = (20, 20, 20), (255, 255, 255), (110, 110, 110)
_LETTERS = "BCSH"  # brightness, contrast, saturation, hue


@dataclass
class Survey:
    """What was found among the images that were looked at.

    Attributes:
        widths: of good images, in pixels, upright.
        heights: likewise.
        encoded: bytes of every image that could be read.
        bad: names by cause.
    """

    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)
    bad: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def looked_at(self) -> int:
        """Good and bad images."""
        return len(self.widths) + sum(map(len, self.bad.values()))

    def report(self, total: int) -> str:
        """Text for a person; `total` is the size of the collection."""
        lines = [f"{total:,} images, {self.looked_at:,} of them decoded: {len(self.widths):,} good"]
        if self.widths:
            lines.append(f"{'':<8}{'min':>12}{'median':>12}{'max':>12}")
            columns = (("width", self.widths), ("height", self.heights), ("bytes", self.encoded))
            for name, values in columns:
                three = (min(values), statistics.median(values), max(values))
                lines.append(f"{name:<8}" + "".join(f"{value:>12,.0f}" for value in three))
        for cause, names in sorted(self.bad.items()):
            lines.append(f"{len(names):,} bad: {cause}")
            lines.extend(f"  {name}" for name in names)
        return "\n".join(lines)


def survey(source: Source, indices: Sequence[int]) -> Survey:
    """Reads and decodes images, at the smallest scale that finds what is wrong with them."""
    found = Survey()
    for index in indices:
        try:
            data = source.read(index)
            found.encoded.append(len(data))
            (_,), (whole,) = cut_crops(data, _whole_image)
        except (BadImage, OSError) as error:
            found.bad[cause_of(error)].append(source.name(index))
        else:
            found.widths.append(whole.box[2])
            found.heights.append(whole.box[3])
    return found


def spread(total: int, most: int) -> list[int]:
    """At most `most` of `total` indices, evenly spaced."""
    count = min(total, most)
    return [place * total // count for place in range(count)]


def contact_sheet(source: Source, multi_crop: MultiCrop, *, count: int, seed: int) -> Image.Image:
    """A sheet of the first good images of an order that follows from the seed.

    Args:
        source: the collection.
        multi_crop: what is drawn and cut.
        count: images on the sheet; fewer where the collection has fewer good ones.
        seed: of the choice of images and of the augmentation.
    """
    chosen = np.random.default_rng(seed).permutation(len(source)).tolist()
    rows: list[list[Image.Image]] = []
    for index in chosen:
        if len(rows) == count:
            break
        try:
            rows.append(list(_row(source, index, multi_crop, seed)))
        except (BadImage, OSError):  # the survey names them
            continue
    width = max((sum(cell.width for cell in row) for row in rows), default=_THUMBNAIL)
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (width + _MARGIN, sum(heights) + _MARGIN), _PAPER)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = _MARGIN
        for cell in row:
            sheet.paste(cell, (left, top))
            left += cell.width
        top += height
    return sheet


def _row(source: Source, index: int, multi_crop: MultiCrop, seed: int) -> Iterator[Image.Image]:
    """The cells of one image.

    Raises:
        BadImage: it cannot be decoded.
        OSError: it cannot be read.
    """
    data = source.read(index)
    whole = decode(data)
    crops, parameters = cut_crops(data, partial(multi_crop.draw, sample_rng(seed, index)))
    about = [f"image {index}", f"{whole.width} x {whole.height}", f"{len(data):,} bytes"]
    whole.thumbnail((_THUMBNAIL, _THUMBNAIL))
    label = source.label(index)
    # A name's end tells more than the folders before it.
    name = [source.name(index)[-34:], *([] if label is None else [f"label {label}"])]
    yield _cell(whole, [*name, *about], _THUMBNAIL)
    for crop, chosen in zip(crops, parameters, strict=True):
        image = Image.fromarray(distort(crop, chosen))
        yield _cell(image, describe(chosen), max(chosen.size, _NARROWEST))


def describe(crop: CropParameters) -> list[str]:
    """All parameters of a crop in short lines."""
    left, top, right, bottom = crop.box
    lines = [f"{right - left} x {bottom - top} at {left}, {top}"]
    if crop.jitter is None:
        lines.append("no jitter")
    else:
        brightness, contrast, saturation, hue = crop.jitter
        lines.append(f"B {brightness:.2f}  C {contrast:.2f}  S {saturation:.2f}")
        lines.append(
            f"H {hue:+.2f}  order {''.join(_LETTERS[which] for which in crop.jitter_order)}"
        )
    others = ["flip"] * crop.flip + ["gray"] * crop.grayscale
    if crop.blur:
        others.append(f"blur {crop.blur:.2f}")
    return [*lines, ", ".join(others) or "no flip, gray or blur"]


def _cell(image: Image.Image, lines: Sequence[str], width: int) -> Image.Image:
    """An image with text below it, and a margin to the right and at the bottom."""
    height = image.height + _MARGIN // 2 + _LINE * len(lines)
    cell = Image.new("RGB", (width + _MARGIN, height + _MARGIN), _PAPER)
    cell.paste(image, (0, 0))
    draw, font = ImageDraw.Draw(cell), _font()
    for number, line in enumerate(lines):
        place = (0, image.height + _MARGIN // 2 + _LINE * number)
        draw.text(place, line, _FAINT if number else _INK, font)
    return cell


def _font() -> FreeTypeFont | BitmapFont:
    """Pillow's own, so that no machine needs a font installed."""
    return ImageFont.load_default(size=_FONT_SIZE)


def _whole_image(width: int, height: int) -> list[CropParameters]:
    """One small crop of everything: its box carries the size, its decoding finds damage."""
    box = (0, 0, width, height)
    return [CropParameters(1, box, False, None, (0, 1, 2, 3), False, 0.0)]
