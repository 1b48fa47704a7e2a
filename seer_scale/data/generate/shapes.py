"""Rendered shapes: a labelled set for whoever has no other, whose classes are nothing but shape.

An image shows some shapes of one class, dark on a light ground. Colour, number, scale, place, angle
and background are drawn without a look at the class, and so is the area of a figure; wide figures
find less room, so that how dark an image is tells the class a little (tests say how much).
Colours differ within an image as they do between images: what distant parts of one have in common
is the class, which is what a method that makes crops of an image agree can learn here. (With dark
and light shapes mixed all crops look alike to an untrained trunk, and SwAV stays at ln K.)
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from seer_scale.errors import DataError

Points = NDArray[np.float64]
Pixels = NDArray[np.uint8]

_SUBPIXEL = 4  # bits of a pixel that OpenCV's coordinates may have behind the point
_GRID = 512
_AREA = (0.05, 0.1)  # of the image, for one shape
_COUNT = (4, 7)
_PATCHES = 3  # of the ground, along a side
_GROUND = (130.0, 255.0)  # of its colours, so that shapes stand out
_DARK = 90.0  # the most that a shape has of red, green or blue
_TILT = 0.35  # radians to either side
_NOISE = 6.0


def _polygon(corners: int, *, inner: float = 1.0) -> Points:
    """Corners on the unit circle; every second one at `inner` of the radius."""
    angles = np.arange(corners) * 2 * math.pi / corners - math.pi / 2
    radii = np.where(np.arange(corners) % 2, inner, 1.0)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def _ellipse(aspect: float, start: float = 0.0, end: float = 2 * math.pi) -> Points:
    angles = np.linspace(start, end, 65)
    return np.stack([np.cos(angles), np.sin(angles) / aspect], axis=1)


def _bars(*boxes: tuple[float, float, float, float]) -> list[Points]:
    """Rectangles as (left, top, right, bottom)."""
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


# Outlines by class, each filled; where two overlap an even number of times there is a hole. All
# are their own mirror images, since augmentation flips.
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
    """Writes `train/CLASS/*.png` and `val/CLASS/*.png` below `folder`, as `open_labelled` takes it.

    The same settings give the same pixels. The folder appears complete or not at all.

    Args:
        folder: has to be missing or empty.
        train: images of the training part, spread evenly over the classes.
        val: images of the validation part.
        size: side of an image in pixels.
        seed: of everything that is drawn.

    Returns:
        The folder.

    Raises:
        DataError: fewer images than classes in a part, a folder that holds something, or one that
            cannot be written.
    """
    target = Path(folder)
    if min(train, val) < len(SHAPES):
        raise DataError(
            f"{train} and {val} images are too few: each part needs one of each of the "
            f"{len(SHAPES)} classes"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} holds something already: name a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise DataError(f"shapes cannot be written to {target}: {error}") from error
    try:
        for number, (part, count) in enumerate((("train", train), ("val", val))):
            _write_part(unfinished / part, count, size=size, seed=(seed, number))
        unfinished.chmod(0o755)
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
    except OSError as error:
        raise DataError(f"shapes cannot be written to {target}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
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
    """One image uint8 `[size, size, 3]`, RGB, of the class `name` of `SHAPES`."""
    canvas = _background(rng, size)
    wanted = int(rng.integers(_COUNT[0], _COUNT[1] + 1))
    placed: list[tuple[float, float, float]] = []
    for _ in range(4 * wanted):  # some attempts fall on others
        area = rng.uniform(*_AREA) * size**2
        outlines = _placed(SHAPES[name](), area, rng.uniform(-_TILT, _TILT))
        radius = float(max(np.hypot(points[:, 0], points[:, 1]).max() for points in outlines))
        margin = min(0.9 * radius, size / 2)  # the edge cuts a little off some
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
    """Turned, and scaled so that what is filled covers `area` pixels, whatever the class."""
    scale = math.sqrt(area / _filled(outlines))
    cos, sin = math.cos(angle), math.sin(angle)
    return [points @ np.array([[cos, sin], [-sin, cos]]) * scale for points in outlines]


def _filled(outlines: list[Points]) -> float:
    """The area between the outlines, counted on a fine grid: holes in holes are simple there."""
    grid = np.zeros((_GRID, _GRID), dtype=np.uint8)
    unit = _GRID / 2 - 1  # pixels
    fine = [np.round((points + 1) * unit).astype(np.int32) for points in outlines]
    cv2.fillPoly(grid, fine, 1)
    return float(grid.sum()) / unit**2


def _background(rng: np.random.Generator, size: int) -> Pixels:
    """Soft patches of many colours, as unlike each other in one image as in two."""
    patches = rng.uniform(*_GROUND, (_PATCHES, _PATCHES, 3))
    ground = cv2.resize(patches, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(ground.clip(0, 255), dtype=np.uint8)


def _draw(canvas: Pixels, outlines: list[Points], rng: np.random.Generator) -> None:
    """Fills the outlines with a dark colour."""
    scaled = [np.round(points * 2**_SUBPIXEL).astype(np.int32) for points in outlines]
    mask = np.zeros(canvas.shape[:2], dtype=np.uint8)
    cv2.fillPoly(mask, scaled, 255, cv2.LINE_AA, _SUBPIXEL)
    share = mask[..., None] / 255
    colour = rng.uniform(0, _DARK, 3)
    canvas[:] = (canvas * (1 - share) + colour * share).round().astype(np.uint8)
