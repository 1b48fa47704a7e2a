"""Rendered shapes: a labelled set for whoever has no other, whose classes are nothing but shape.

An image shows one to five shapes of one class. Colour, number, scale, place, angle and
background are drawn without a look at the class, so no average colour, no share of pixels and no
texture tells it. Several of a kind in an image are what lets crops of it agree about the class.
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
_AREA = (0.035, 0.12)  # of the image, for one shape
_MOST = 5
_DISTANCE = 110.0  # in RGB, between a shape and the ground beneath it


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


def _heart() -> list[Points]:
    t = np.linspace(0, 2 * math.pi, 80)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([x, -y], axis=1) / 16]


# Outlines by class, each filled; where two overlap an even number of times there is a hole. All
# are their own mirror images, since augmentation flips.
SHAPES: dict[str, Callable[[], list[Points]]] = {
    "arrow": lambda: [
        np.array([[0, -1], [0.8, 0], [0.3, 0], [0.3, 1], [-0.3, 1], [-0.3, 0], [-0.8, 0]])
    ],
    "bowtie": lambda: [np.array([[-1, -0.8], [0, 0], [1, -0.8], [1, 0.8], [0, 0], [-1, 0.8]])],
    "disc": lambda: [_ellipse(1.0)],
    "frame": lambda: _bars((-1, -1, 1, 1), (-0.6, -0.6, 0.6, 0.6)),
    "grille": lambda: _bars((-1, -1, -0.6, 1), (-0.2, -1, 0.2, 1), (0.6, -1, 1, 1)),
    "half": lambda: [_ellipse(1.0, 0.0, math.pi)],
    "heart": _heart,
    "plus": lambda: [
        np.array(
            [
                *([-0.3, -1], [0.3, -1], [0.3, -0.3], [1, -0.3], [1, 0.3], [0.3, 0.3]),
                *([0.3, 1], [-0.3, 1], [-0.3, 0.3], [-1, 0.3], [-1, -0.3], [-0.3, -0.3]),
            ]
        )
    ],
    "ring": lambda: [_ellipse(1.0), 0.6 * _ellipse(1.0)],
    "square": lambda: _bars((-1, -1, 1, 1)),
    "star": lambda: [_polygon(10, inner=0.42)],
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
    wanted = int(rng.integers(1, _MOST + 1))
    placed: list[tuple[float, float, float]] = []
    for _ in range(4 * wanted):  # some attempts fall on others
        area = rng.uniform(*_AREA) * (1.0 if wanted > 2 else 1.8)
        outlines = _placed(SHAPES[name](), area * size**2, rng.uniform(-0.35, 0.35))
        radius = float(max(np.hypot(points[:, 0], points[:, 1]).max() for points in outlines))
        margin = min(0.9 * radius, size / 2)  # the edge cuts a little off some
        x, y = rng.uniform(margin, size - margin, 2)
        if any(math.hypot(x - a, y - b) < 0.9 * (radius + r) for a, b, r in placed):
            continue
        placed.append((x, y, radius))
        _draw(canvas, [points + np.array([x, y]) for points in outlines], rng)
        if len(placed) == wanted:
            break
    noisy = canvas.astype(np.float64) + rng.normal(0, rng.uniform(2, 10), canvas.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def _placed(outlines: list[Points], area: float, angle: float) -> list[Points]:
    """Turned, and scaled so that what is filled covers `area` pixels, whatever the class."""
    filled = abs(sum(_signed_area(points) for points in _alternating(outlines)))
    scale = math.sqrt(area / filled)
    cos, sin = math.cos(angle), math.sin(angle)
    return [points @ np.array([[cos, sin], [-sin, cos]]) * scale for points in outlines]


def _alternating(outlines: list[Points]) -> list[Points]:
    """Those that lie within the first turned round, so that their area counts as a hole."""
    first = outlines[0]
    box = (first.min(0), first.max(0))
    result = [first if _signed_area(first) > 0 else first[::-1]]
    for points in outlines[1:]:
        inside = (points >= box[0]).all() and (points <= box[1]).all()
        positive = points if _signed_area(points) > 0 else points[::-1]
        result.append(positive[::-1] if inside else positive)
    return result


def _signed_area(points: Points) -> float:
    x, y = points[:, 0], points[:, 1]
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _background(rng: np.random.Generator, size: int) -> Pixels:
    """A gradient between two colours in any direction, sometimes with a soft pattern."""
    first, second = rng.integers(0, 256, (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    along = (math.cos(angle) * x + math.sin(angle) * y + 0.7) / 1.4
    ground = first + (second - first) * along[..., None].clip(0, 1)
    if rng.random() < 0.5:
        cells = int(rng.integers(3, 8))
        coarse = rng.normal(0, 18, (cells, cells, 3))
        ground = ground + cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(ground.clip(0, 255), dtype=np.uint8)


def _draw(canvas: Pixels, outlines: list[Points], rng: np.random.Generator) -> None:
    """Fills the outlines with a colour that differs from what lies beneath."""
    scaled = [np.round(points * 2**_SUBPIXEL).astype(np.int32) for points in outlines]
    mask = np.zeros(canvas.shape[:2], dtype=np.uint8)
    cv2.fillPoly(mask, scaled, 255, cv2.LINE_AA, _SUBPIXEL)
    beneath = canvas[mask > 0].mean(0) if (mask > 0).any() else canvas.mean((0, 1))
    colour = rng.uniform(0, 255, 3)
    while np.linalg.norm(colour - beneath) < _DISTANCE:
        colour = rng.uniform(0, 255, 3)
    share = mask[..., None] / 255
    canvas[:] = (canvas * (1 - share) + colour * share).round().astype(np.uint8)
