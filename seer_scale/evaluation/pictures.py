"""Pictures of an evaluation: the confusion matrix, and queries with their nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from seer_scale.data import Source
from seer_scale.data.contact_sheet import INK, MARGIN, Colour, draw_cell, draw_sheet
from seer_scale.data.decode import decode
from seer_scale.evaluation.datasets.labelled import LabelledData

_THUMBNAIL = 112  # pixels of the longer side
_RIGHT, _WRONG = (20, 130, 60), (190, 40, 30)
_NAMED_CLASSES = 40  # the names of more classes would overlap
_COUNTED_CLASSES = 20

Labelled = tuple[int, int]
"""Number of an image in its source, and number of its class."""


def draw_confusion(path: Path, matrix: Tensor, classes: Sequence[str]) -> Path:
    """Draws a confusion matrix as a PNG: the share of each true class by predicted class.

    Args:
        path: file of the picture.
        matrix: counts [classes, classes]; rows are true classes, columns predicted ones.
        classes: names of the classes.

    Returns:
        `path`.
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
        # A name with two $ is not a formula.
        axes.set_xticks(range(count), classes, rotation=90, parse_math=False)
        axes.set_yticks(range(count), classes, parse_math=False)
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
    """Draws each query and its nearest training images in a row of a PNG.

    The query's own class is written in green, any other class in red.

    Args:
        path: file of the picture.
        data: the training and the validation part.
        rows: for each query the validation image, its nearest training images, nearest first, and
            the predicted class.

    Returns:
        `path`.
    """
    gap = draw_cell(None, (), MARGIN)
    cells: list[list[Image.Image]] = []
    for (query, truth), neighbours, predicted in rows:
        verdict = _RIGHT if predicted == truth else _WRONG
        lines = [(data.classes[truth], INK), (f"-> {data.classes[predicted]}", verdict)]
        cells.append([_cell(data.val.source, query, lines), gap])
        for index, label in neighbours:
            colour = _RIGHT if label == truth else _WRONG
            cells[-1].append(_cell(data.train.source, index, [(data.classes[label], colour)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(cells).save(path)
    return path


def _cell(source: Source, index: int, lines: Sequence[tuple[str, Colour]]) -> Image.Image:
    image = decode(source.read(index))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return draw_cell(image, lines, _THUMBNAIL)
