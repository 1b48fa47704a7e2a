"""Pictures of an evaluation: the confusion matrix, and queries beside their nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from seer_scale.data import Source
from seer_scale.data.decode import decode
from seer_scale.evaluation.datasets.labelled import LabelledData

_THUMBNAIL, _MARGIN, _LINE, _FONT_SIZE = 112, 6, 13, 11
_PAPER, _INK = (255, 255, 255), (20, 20, 20)
_RIGHT, _WRONG = (20, 130, 60), (190, 40, 30)
_NAMED_CLASSES = 40  # beyond that their names would overlap
_COUNTED_CLASSES = 20
_LETTERS = 17  # of a class's name that fit beneath a thumbnail

Labelled = tuple[int, int]
"""Number of an image in its source, and of its class."""


def draw_confusion(path: Path, matrix: Tensor, classes: Sequence[str]) -> Path:
    """Draws shares of each true class (row) by predicted class (column) as a PNG.

    Args:
        path: of the picture.
        matrix: counts [classes, classes].
        classes: their names.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    count = len(classes)
    side = min(16.0, 4.0 + 0.35 * count)
    figure, axes = pyplot.subplots(figsize=(side, side), layout="constrained")
    shown = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    if count <= _NAMED_CLASSES:
        axes.set_xticks(range(count), classes, rotation=90)
        axes.set_yticks(range(count), classes)
    if count <= _COUNTED_CLASSES:
        for row, counts in enumerate(matrix.tolist()):
            for column, number in enumerate(counts):
                if number:
                    dark = shares[row, column] > 0.5
                    axes.text(
                        column,
                        row,
                        str(number),
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if dark else "black",
                    )
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    right = float(matrix.diagonal().sum() / matrix.sum().clamp(min=1))
    axes.set_title(f"{int(matrix.sum()):,} images, {right:.1%} right")
    figure.colorbar(shown, ax=axes, shrink=0.75, label="share of the true class")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def draw_neighbours(
    path: Path,
    data: LabelledData,
    rows: Sequence[tuple[Labelled, Sequence[Labelled], int]],
) -> Path:
    """Draws a row per query: the query, then its nearest training images, as a PNG.

    Classes in green are the query's own, those in red are others.

    Args:
        path: of the picture.
        data: both parts.
        rows: a validation image, its nearest training images, and the class that was predicted.
    """
    columns = 1 + max(len(neighbours) for _, neighbours, _ in rows)
    cell_width, cell_height = _THUMBNAIL + _MARGIN, _THUMBNAIL + 2 * _LINE + _MARGIN
    gap = 3 * _MARGIN  # between the query and its neighbours
    sheet = Image.new(
        "RGB",
        (columns * cell_width + gap + _MARGIN, len(rows) * cell_height + _MARGIN),
        _PAPER,
    )
    for number, ((query, truth), neighbours, predicted) in enumerate(rows):
        top = _MARGIN + number * cell_height
        verdict = _RIGHT if predicted == truth else _WRONG
        lines = [(data.classes[truth], _INK), (f"-> {data.classes[predicted]}", verdict)]
        _cell(sheet, data.val.source, query, (_MARGIN, top), lines)
        for place, (index, label) in enumerate(neighbours, start=1):
            colour = _RIGHT if label == truth else _WRONG
            left = _MARGIN + gap + place * cell_width
            _cell(sheet, data.train.source, index, (left, top), [(data.classes[label], colour)])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _cell(
    sheet: Image.Image,
    source: Source,
    index: int,
    corner: tuple[int, int],
    lines: Sequence[tuple[str, tuple[int, int, int]]],
) -> None:
    image = decode(source.read(index))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    left, top = corner
    sheet.paste(image, (left + (_THUMBNAIL - image.width) // 2, top))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_FONT_SIZE)
    for number, (text, colour) in enumerate(lines):
        place = (left, top + _THUMBNAIL + number * _LINE)
        draw.text(place, text[:_LETTERS], colour, font)
