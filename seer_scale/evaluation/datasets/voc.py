"""Images with several labels each: VOC's annotation layout, or any labelled set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from seer_scale.data import Source, open_source
from seer_scale.errors import DataError, examples
from seer_scale.evaluation.datasets.labelled import LabelledImages, open_labelled

PRESENT, ABSENT, IGNORED = 1, -1, 0
_MARKS = {"1": PRESENT, "-1": ABSENT, "0": IGNORED}  # 0: every such object is hard to see


@dataclass(frozen=True)
class MultiLabelImages:
    """Images, and whether each class is in each image.

    Attributes:
        images: N images; their `targets` mean nothing.
        marks: int8 [N, classes] of PRESENT, ABSENT and IGNORED.
    """

    images: LabelledImages
    marks: NDArray[np.int8]


@dataclass(frozen=True)
class MultiLabelData:
    """Training and validation part; `classes` names the columns of `marks`."""

    train: MultiLabelImages
    val: MultiLabelImages
    classes: list[str]


def open_multi_label(
    path: str, labels: str | None = None, say: Callable[[str], None] | None = None
) -> MultiLabelData:
    """Opens a set in VOC's layout, or any set that `open_labelled` takes.

    In a set of the second kind each image has its own class, and every other class is absent.

    Args:
        path: a folder with `JPEGImages` and `ImageSets/Main/CLASS_{trainval,test}.txt`, either
            directly below it or below `VOCdevkit/VOC2007` or `VOC2007`; or a set of
            `open_labelled`.
        labels: see `open_labelled`; a file makes any set one of the second kind.
        say: see `open_labelled`.

    Raises:
        DataError: an annotation file is missing or damaged, or names an image that does not exist.
    """
    root = _voc_root(path)
    if root is not None and labels is None:
        return _open_voc(root)
    data = open_labelled(path, labels, say)
    parts = [
        MultiLabelImages(part, _one_of(part.targets.numpy(), len(data.classes)))
        for part in (data.train, data.val)
    ]
    return MultiLabelData(parts[0], parts[1], data.classes)


def _voc_root(path: str) -> Path | None:
    for below in ("", "VOC2007", "VOCdevkit/VOC2007"):
        root = Path(path) / below
        if (root / "ImageSets" / "Main").is_dir():
            return root
    return None


def _one_of(targets: NDArray[np.int64], classes: int) -> NDArray[np.int8]:
    marks = np.full((len(targets), classes), ABSENT, dtype=np.int8)
    marks[np.arange(len(targets)), targets] = PRESENT
    return marks


def _open_voc(root: Path) -> MultiLabelData:
    lists = root / "ImageSets" / "Main"
    classes = sorted(
        path.name.removesuffix("_trainval.txt") for path in lists.glob("*_trainval.txt")
    )
    if not classes:
        raise DataError(f"{lists} has no CLASS_trainval.txt: give a folder in VOC's layout")
    if not (root / "JPEGImages").is_dir():
        raise DataError(f"{root} has no folder JPEGImages: give a folder in VOC's layout")
    source = open_source(root / "JPEGImages")
    numbers = {Path(source.name(index)).stem: index for index in range(len(source))}
    train, val = (_part(lists, classes, part, source, numbers) for part in ("trainval", "test"))
    return MultiLabelData(train, val, classes)


def _part(
    lists: Path, classes: list[str], part: str, source: Source, numbers: dict[str, int]
) -> MultiLabelImages:
    columns = [_read(lists / f"{name}_{part}.txt") for name in classes]
    names = sorted(columns[0])
    for name, column in zip(classes, columns, strict=True):
        if column.keys() != columns[0].keys():
            raise DataError(
                f"{lists}/{name}_{part}.txt does not list the same images as "
                f"{classes[0]}_{part}.txt: every class needs a line for every image"
            )
    if missing := [name for name in names if name not in numbers]:
        raise DataError(
            f"{lists}: {len(missing)} of {len(names)} images of the {part} part are not in "
            f"JPEGImages ({examples(missing)}): add these images or remove their lines"
        )
    marks = np.array([[column[name] for column in columns] for name in names], dtype=np.int8)
    indices = np.array([numbers[name] for name in names], dtype=np.int64)
    targets = torch.zeros(len(names), dtype=torch.int64)
    return MultiLabelImages(LabelledImages(source, indices, targets), marks)


def _read(path: Path) -> dict[str, int]:
    """Returns the mark of each image by the image's name."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    marks = {}
    for number, line in enumerate(lines, start=1):
        if not (fields := line.split()):
            continue
        if len(fields) != 2 or fields[1] not in _MARKS:
            raise DataError(
                f"{path}, line {number}: {line!r} is not an image's name and 1, -1 or 0"
            )
        marks[fields[0]] = _MARKS[fields[1]]
    if not marks:
        raise DataError(f"{path} is empty: it needs a line for every image")
    return marks
