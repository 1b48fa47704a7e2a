"""Rendered shapes: a labelled set whose classes differ in nothing but shape.

An image shows several shapes of one class, dark on a light background. Colour, number, scale,
place, angle, area and background do not depend on the class. Wide shapes find less room, so the
darkness of an image still tells the class a little; a test says how much.

Colours vary within an image as much as between images. Distant parts of one image therefore share
only the class, and a method that makes crops of an image agree can learn the class. (If dark and
light shapes were mixed, an untrained trunk could not tell crops apart, and SwAV's loss would stay
at ln K for K prototypes.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from seer_scale.data.generate.folder import complete_folder
from seer_scale.errors import DataError

Points = NDArray[np.float64]
Pixels = NDArray[np.uint8]

_SUBPIXEL = 4  # fractional bits of OpenCV's coordinates
_GRID = 512  # side of the grid on which areas are counted
_AREA = (0.05, 0.1)  # share of the image that one shape covers
_COUNT = (4, 7)  # shapes in an image
_PATCHES = 3  # colour patches of the background along a side
_GROUND = (130.0, 255.0)  # range of the background's colours, so that shapes stand out
_DARK = 90.0  # most red, green or blue of a shape
_TILT = 0.35  # largest rotation to either side, in radians
_NOISE = 6.0  # standard deviation of the noise on every pixel


def _polygon(corners: int, *, inner: float = 1.0) -> Points:
    """Returns corners on the unit circle; every second one is at `inner` of the radius."""
    angles = np.arange(corners) * 2 * math.pi / corners - math.pi / 2
    radii = np.where(np.arange(corners) % 2, inner, 1.0)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def _ellipse(aspect: float, start: float = 0.0, end: float = 2 * math.pi) -> Points:
    angles = np.linspace(start, end, 65)
    return np.stack([np.cos(angles), np.sin(angles) / aspect], axis=1)


def _bars(*boxes: tuple[float, float, float, float]) -> list[Points]:
    """Returns rectangles given as (left, top, right, bottom)."""
    return [
        np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
        for left, top, right, bottom in boxes
    ]


def _dots(places: list[float], radius: float) -> list[Points]:
    return [radius * _ellipse(1.0) + np.array([x, y]) for x in places for y in places]


def _checks(count: int) -> list[Points]:
    side = 2 / count
    return _bars(
        *(
            (-1 + x * side, -1 + y * side, -1 + (x + 1) * side, -1 + (y + 1) * side)
            for x in range(count)
            for y in range(count)
            if (x + y) % 2 == 0
        )
    )


# Filled outlines by class; an even number of overlapping outlines makes a hole. Every shape is its
# own mirror image, because the augmentation flips images.
SHAPES: dict[str, Callable[[], list[Points]]] = {
    "checks": lambda: _checks(5),
    "disc": lambda: [_ellipse(1.0)],
    "dots": lambda: _dots([-0.75, -0.25, 0.25, 0.75], 0.17),
    "frame": lambda: _bars((-1, -1, 1, 1), (-0.65, -0.65, 0.65, 0.65)),
    "grille": lambda: _bars(*((x, -1.0, x + 0.2, 1.0) for x in (-1.0, -0.55, -0.1, 0.35, 0.8))),
    "ladder": lambda: _bars(*((-1.0, y, 1.0, y + 0.2) for y in (-1.0, -0.55, -0.1, 0.35, 0.8))),
    "plus": lambda: [
        np.array(
            [
                *([-0.3, -1], [0.3, -1], [0.3, -0.3], [1, -0.3], [1, 0.3], [0.3, 0.3]),
                *([0.3, 1], [-0.3, 1], [-0.3, 0.3], [-1, 0.3], [-1, -0.3], [-0.3, -0.3]),
            ]
        )
    ],
    "ring": lambda: [_ellipse(1.0), 0.65 * _ellipse(1.0)],
    "square": lambda: _bars((-1, -1, 1, 1)),
    "star": lambda: [_polygon(10, inner=0.42)],
    "target": lambda: [radius * _ellipse(1.0) for radius in (1.0, 0.78, 0.56, 0.34)],
    "triangle": lambda: [_polygon(3)],
}


def write_shapes(
    folder: str | os.PathLike[str],
    *,
    train: int = 1200,
    val: int = 600,
    size: int = 96,
    seed: int = 0,
) -> Path:
    """Writes `train/CLASS/*.png` and `val/CLASS/*.png` below `folder`, for `open_labelled`.

    The same settings give the same pixels. The folder appears complete or not at all.

    Args:
        folder: a folder that is missing or empty.
        train: training images, spread evenly over the classes.
        val: validation images, spread evenly over the classes.
        size: side of an image in pixels.
        seed: seed of everything that is drawn.

    Returns:
        The folder.

    Raises:
        DataError: a part has fewer images than classes, or the folder is not empty or cannot be
            written.
    """
    target = Path(folder)
    if min(train, val) < len(SHAPES):
        raise DataError(
            f"{train} and {val} images are too few: each part needs one of each of the "
            f"{len(SHAPES)} classes"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} is not empty: name a new folder")
    with complete_folder(target, "shapes") as unfinished:
        for number, (part, count) in enumerate((("train", train), ("val", val))):
            _write_part(unfinished / part, count, size=size, seed=(seed, number))
    return target


def _write_part(folder: Path, count: int, *, size: int, seed: tuple[int, int]) -> None:
    names = sorted(SHAPES)
    for name in names:
        (folder / name).mkdir(parents=True)
    for index in range(count):
        name = names[index % len(names)]
        pixels = render(name, np.random.default_rng((*seed, index)), size)
        path = folder / name / f"{index:05d}.png"
        if not cv2.imwrite(str(path), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)):
            raise OSError(f"{path} was not written")


def render(name: str, rng: np.random.Generator, size: int) -> Pixels:
    """Renders an RGB image uint8 [size, size, 3] of the class `name` of `SHAPES`."""
    canvas = _background(rng, size)
    wanted = int(rng.integers(_COUNT[0], _COUNT[1] + 1))
    placed: list[tuple[float, float, float]] = []
    for _ in range(4 * wanted):  # some attempts overlap with earlier shapes
        area = rng.uniform(*_AREA) * size**2
        outlines = _placed(SHAPES[name](), area, rng.uniform(-_TILT, _TILT))
        radius = float(max(np.hypot(points[:, 0], points[:, 1]).max() for points in outlines))
        margin = min(0.9 * radius, size / 2)  # the edge cuts off a little of some
        x, y = rng.uniform(margin, size - margin, 2)
        if any(math.hypot(x - a, y - b) < 0.9 * (radius + r) for a, b, r in placed):
            continue
        placed.append((x, y, radius))
        _draw(canvas, [points + np.array([x, y]) for points in outlines], rng)
        if len(placed) == wanted:
            break
    noisy = canvas.astype(np.float64) + rng.normal(0, _NOISE, canvas.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def _placed(outlines: list[Points], area: float, angle: float) -> list[Points]:
    """Rotates outlines, and scales them so that the filled shape covers `area` pixels."""
    scale = math.sqrt(area / _filled(outlines))
    cos, sin = math.cos(angle), math.sin(angle)
    return [points @ np.array([[cos, sin], [-sin, cos]]) * scale for points in outlines]


def _filled(outlines: list[Points]) -> float:
    """Returns the filled area, counted on a fine grid, where holes within holes are easy."""
    grid = np.zeros((_GRID, _GRID), dtype=np.uint8)
    unit = _GRID / 2 - 1  # pixels
    fine = [np.round((points + 1) * unit).astype(np.int32) for points in outlines]
    cv2.fillPoly(grid, fine, 1)
    return float(grid.sum()) / unit**2


def _background(rng: np.random.Generator, size: int) -> Pixels:
    """Draws soft patches of colours that vary as much within an image as between images."""
    patches = rng.uniform(*_GROUND, (_PATCHES, _PATCHES, 3))
    ground = cv2.resize(patches, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(ground.clip(0, 255), dtype=np.uint8)


def _draw(canvas: Pixels, outlines: list[Points], rng: np.random.Generator) -> None:
    """Fills the outlines with a random dark colour."""
    scaled = [np.round(points * 2**_SUBPIXEL).astype(np.int32) for points in outlines]
    mask = np.zeros(canvas.shape[:2], dtype=np.uint8)
    cv2.fillPoly(mask, scaled, 255, cv2.LINE_AA, _SUBPIXEL)
    share = mask[..., None] / 255
    colour = rng.uniform(0, _DARK, 3)
    canvas[:] = (canvas * (1 - share) + colour * share).round().astype(np.uint8)
