"""The report of `seer-scale data inspect`: sizes and bad files of a collection, and its crops.

The contact sheet has a row per image: the whole image, then its distorted crops as the model sees
them, each with its parameters. The images are the first ones of a run, cropped as the run crops
them, or random ones.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image

from seer_scale.data.augment import CropParameters, MultiCrop, distort
from seer_scale.data.contact_sheet import FAINT, INK, Colour, draw_cell, draw_sheet
from seer_scale.data.crops import cut_crops
from seer_scale.data.decode import BadImage, cause_of, decode
from seer_scale.data.order import Order, sample_rng
from seer_scale.data.sources import Source

_THUMBNAIL = 200  # pixels of the longer side of the whole image
_NARROWEST = 132  # pixels that a line of text takes
_LETTERS = "BCSH"  # brightness, contrast, saturation, hue


@dataclass
class Survey:
    """Sizes and faults of the images that were looked at.

    Attributes:
        widths: widths of the good images in pixels, after EXIF's rotation.
        heights: heights of the good images, likewise.
        encoded: file sizes in bytes of all images that could be read.
        bad: names of the bad images, by cause.
    """

    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)
    bad: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def looked_at(self) -> int:
        """Number of good and bad images."""
        return len(self.widths) + sum(map(len, self.bad.values()))

    def report(self, source: Source) -> str:
        """Formats the survey as text, with what `source`, the collection, leaves out."""
        total = len(source)
        good = len(self.widths)
        lines = [
            f"{total:,} images, {self.looked_at:,} of them checked: {good:,} good, "
            f"{self.looked_at - good:,} bad"
        ]
        if self.widths:
            lines.append(f"{'':<8}{'min':>12}{'median':>12}{'max':>12}")
            columns = (("width", self.widths), ("height", self.heights), ("bytes", self.encoded))
            for name, values in columns:
                three = (min(values), statistics.median(values), max(values))
                lines.append(f"{name:<8}" + "".join(f"{value:>12,.0f}" for value in three))
        for cause, names in sorted(self.bad.items()):
            lines.append(f"{len(names):,} bad: {cause}")
            lines.extend(f"  {name}" for name in names)
        lines += source.left_out.lines()
        return "\n".join(lines)


def survey(source: Source, indices: Sequence[int]) -> Survey:
    """Reads images and decodes them at the smallest scale that still finds their faults."""
    found = Survey()
    sizes: list[tuple[int, int]] = []
    for index in indices:
        try:
            data = source.read(index)
            found.encoded.append(len(data))
            cut_crops(data, lambda width, height: _note_size(width, height, sizes))
        except (BadImage, OSError) as error:
            found.bad[cause_of(error)].append(source.name(index))
        else:
            found.widths.append(sizes[-1][0])
            found.heights.append(sizes[-1][1])
    return found


def spread(total: int, most: int) -> list[int]:
    """Returns at most `most` evenly spaced indices of `range(total)`."""
    count = min(total, most)
    return [place * total // count for place in range(count)]


Choice = Iterable[tuple[int, np.random.Generator]]
"""Numbers of images, each with the generator that its crops are drawn from."""


def random_images(source: Source, seed: int) -> Choice:
    """Yields all images in random order; the crops depend on the seed and the image's number."""
    for index in np.random.default_rng(seed).permutation(len(source)).tolist():
        yield index, sample_rng(seed, index)


def first_images(source: Source, seed: int, window: int) -> Choice:
    """Yields the images of a run's first epoch in the run's order, with the run's generators.

    Args:
        source: the collection.
        seed: `run.seed`.
        window: `data.window`.
    """
    order = Order(source.shard_sizes, seed=seed, version=source.version, window=window)
    for position in range(len(source)):
        yield order.index(order.place(position)), sample_rng(seed, position)


def draw_crops(source: Source, multi_crop: MultiCrop, choice: Choice, *, count: int) -> Image.Image:
    """Draws the contact sheet of good images.

    Args:
        source: the collection.
        multi_crop: draws the parameters of the crops.
        choice: the images in order; bad ones are passed over.
        count: images on the sheet; there are fewer if there are fewer good ones.
    """
    rows: list[list[Image.Image]] = []
    for index, rng in choice:
        if len(rows) == count:
            break
        try:
            rows.append(list(_row(source, index, multi_crop, rng)))
        except (BadImage, OSError):  # the survey reports it
            continue
    return draw_sheet(rows)


def _row(
    source: Source, index: int, multi_crop: MultiCrop, rng: np.random.Generator
) -> Iterator[Image.Image]:
    """Yields the cells of one image.

    Raises:
        BadImage: the image cannot be decoded.
        OSError: the image cannot be read.
    """
    data = source.read(index)
    whole = decode(data)
    crops, parameters = cut_crops(data, partial(multi_crop.draw, rng))
    about = [f"image {index}", f"{whole.width} x {whole.height}", f"{len(data):,} bytes"]
    whole.thumbnail((_THUMBNAIL, _THUMBNAIL))
    label = source.label(index)
    # The end of a name tells more than the folders before it.
    name = [source.name(index)[-34:], *([] if label is None else [f"label {label}"])]
    yield draw_cell(whole, _in_ink([*name, *about]), _THUMBNAIL)
    for crop, chosen in zip(crops, parameters, strict=True):
        image = Image.fromarray(distort(crop, chosen))
        yield draw_cell(image, _in_ink(describe(chosen)), max(chosen.size, _NARROWEST))


def _in_ink(lines: Sequence[str]) -> list[tuple[str, Colour]]:
    """Colours the first line dark and the others faint."""
    return [(line, FAINT if number else INK) for number, line in enumerate(lines)]


def describe(crop: CropParameters) -> list[str]:
    """Describes all parameters of a crop in short lines."""
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


def _note_size(width: int, height: int, sizes: list[tuple[int, int]]) -> list[CropParameters]:
    """Notes the size of an image; returns one small crop, since decoding finds damage.

    The crop is a square: to resize the whole of a very long image would take gigabytes.
    """
    sizes.append((width, height))
    side = min(width, height)
    return [CropParameters(1, (0, 0, side, side), False, None, (0, 1, 2, 3), False, 0.0)]
