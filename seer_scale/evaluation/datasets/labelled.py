"""Labelled images in two parts, to train on and to be judged by, with their classes.

A folder or an address with `train` and `val` below it, each in any form that `open_source` takes
and that tells a class; labels may also come from a file.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seer_scale.data import Source, open_source
from seer_scale.errors import DataError

_PARTS = {"train": ("train",), "val": ("val", "validation", "test")}
_NAMED = 3  # examples in a sentence


@dataclass(frozen=True)
class LabelledImages:
    """Images and the class of each.

    Attributes:
        source: the images.
        indices: int64 [N], which of them.
        targets: int64 [N], the class of each.
    """

    source: Source
    indices: NDArray[np.int64]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, positions: Sequence[int] | NDArray[np.int64]) -> LabelledImages:
        """Some of them, by position."""
        chosen = np.asarray(positions, dtype=np.int64)
        return LabelledImages(self.source, self.indices[chosen], self.targets[chosen])


@dataclass(frozen=True)
class LabelledData:
    """Both parts; `classes` are the sorted names that targets number."""

    train: LabelledImages
    val: LabelledImages
    classes: list[str]


def open_labelled(path: str, labels: str | None = None) -> LabelledData:
    """Opens a labelled set.

    Args:
        path: a folder or address with `train` and `val` (or `validation`, `test`) below it, or two
            of them as `TRAIN,VAL`. Each is a folder with a folder per class, or shards with a
            `.cls` beside each image.
        labels: a CSV or TSV of `name,class` that names every image, by its path below the part or
            its file's name; instead of the labels that the layout tells.

    Raises:
        DataError: a part is missing; an image has no label; a line of `labels` names no image, or
            an image twice; or a class is in the validation part only.
    """
    parts = [open_source(part) for part in _find_parts(path)]
    named = _read_labels(labels) if labels else None
    if named is not None:
        used: set[str] = set()
        names = [_labels_by_name(source, named, labels or "", used) for source in parts]
        if unused := [name for name in named if name not in used]:
            raise DataError(
                f"{labels} labels {len(unused)} images that are not in {path} "
                f"({_examples(unused)}): remove these lines, or give the file of this set"
            )
    else:
        names = [_labels_of(source) for source in parts]
    classes = sorted(set(names[0]))
    if unknown := sorted(set(names[1]) - set(classes)):
        raise DataError(
            f"{path}: {len(unknown)} classes are in the validation part only "
            f"({_examples(unknown)}): no head can have learned them; add training images of them "
            "or remove them"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    train, val = (
        LabelledImages(
            source,
            np.arange(len(source), dtype=np.int64),
            torch.tensor([numbers[name] for name in mine], dtype=torch.int64),
        )
        for source, mine in zip(parts, names, strict=True)
    )
    return LabelledData(train, val, classes)


def listed_end(name: str, listed: Container[str]) -> str | None:
    """The longest end of an image's path that is among `listed`, whole parts of the path only."""
    parts = name.split(os.sep)
    ends = (os.sep.join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in listed), None)


def _find_parts(path: str) -> tuple[str, str]:
    first, comma, second = path.partition(",")
    if comma:
        return first, second
    root = Path(path)
    if not root.is_dir():
        raise DataError(
            f"--data {path} is no folder with `train` and `val` below it; give one, or both parts "
            "as TRAIN,VAL"
        )
    found = {}
    for part, names in _PARTS.items():
        candidates = [root / name for name in names if (root / name).exists()]
        if not candidates:
            raise DataError(
                f"--data {path} has no `{part}` below it: an evaluation needs `train` and `val`, "
                "or both parts as TRAIN,VAL"
            )
        found[part] = str(candidates[0])
    return found["train"], found["val"]


def _labels_of(source: Source) -> list[str]:
    labels = [source.label(index) for index in range(len(source))]
    missing = [source.name(index) for index, label in enumerate(labels) if label is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(labels)} images have no label ({_examples(missing)}): put "
            "images into one folder per class, a .cls file beside each in the shards, or give "
            "--labels"
        )
    return [str(label) for label in labels]


def _read_labels(path: str) -> dict[str, str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--labels {path} cannot be read ({error})") from None
    lines = text.splitlines()
    tab = bool(lines) and "\t" in lines[0]
    labels: dict[str, str] = {}
    for number, row in enumerate(csv.reader(lines, delimiter="\t" if tab else ","), start=1):
        if not row or (number == 1 and [cell.strip() for cell in row[:2]] == ["name", "class"]):
            continue
        if len(row) != 2 or not row[0].strip() or not row[1].strip():
            raise DataError(f"--labels {path}, line {number}: {row} is not `name,class`")
        name, label = row[0].strip(), row[1].strip()
        if labels.setdefault(name, label) != label:
            raise DataError(
                f"--labels {path}, line {number}: {name} is labelled {label} here and "
                f"{labels[name]} above; leave one"
            )
    if not labels:
        raise DataError(f"--labels {path} is empty: one `name,class` per line is needed")
    return labels


def _labels_by_name(source: Source, labels: dict[str, str], path: str, used: set[str]) -> list[str]:
    found: list[str] = []
    missing: list[str] = []
    for index in range(len(source)):
        name = source.name(index)
        key = listed_end(name, labels)
        if key is None:
            missing.append(name)
        else:
            used.add(key)
            found.append(labels[key])
    if missing:
        raise DataError(
            f"--labels {path} has no line for {len(missing)} of {len(source)} images "
            f"({_examples(missing)}): it does not match these images"
        )
    return found


def _examples(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
