"""Labelled images in two parts, one for training and one for validation, and their classes.

A labelled set is a folder or address with `train` and `val` below it. Each part has any form that
`open_source` takes. Labels come from the layout of the set or from a file.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seer_scale.data import Source, open_source
from seer_scale.errors import DataError, examples

_PARTS = {"train": ("train",), "val": ("val", "validation", "test")}


@dataclass(frozen=True)
class LabelledImages:
    """Images and the class of each.

    Attributes:
        source: source that holds the images.
        indices: int64 [N], the number of each image in `source`.
        targets: int64 [N], the class of each image.
    """

    source: Source
    indices: NDArray[np.int64]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def whole(cls, source: Source) -> LabelledImages:
        """Returns all images of a source; every target is 0."""
        count = len(source)
        return cls(source, np.arange(count, dtype=np.int64), torch.zeros(count, dtype=torch.int64))

    def subset(self, positions: Sequence[int] | NDArray[np.int64]) -> LabelledImages:
        """Returns the images at the given positions, in their order."""
        chosen = np.asarray(positions, dtype=np.int64)
        return LabelledImages(self.source, self.indices[chosen], self.targets[chosen])


@dataclass(frozen=True)
class LabelledData:
    """Training and validation part; `classes[n]` is the name of target n, in sorted order."""

    train: LabelledImages
    val: LabelledImages
    classes: list[str]


def open_labelled(
    path: str,
    labels: str | None = None,
    say: Callable[[str], None] | None = None,
    *,
    option: str = "--data ",
) -> LabelledData:
    """Opens a labelled set.

    Args:
        path: a folder or address with `train` and `val` (or `validation`, `test`) below it, or both
            parts as `TRAIN,VAL`. A part is a folder with one folder per class, or shards with a
            `.cls` beside each image. The class of an image in a folder is the first folder below
            the part, as in torchvision's ImageFolder.
        labels: a CSV or TSV file of `name,class` that replaces the labels of the layout. It names
            every image, by the image's path below the part or by its file name.
        say: takes lines about the number of classes and images, and what is left out.
        option: what the user wrote before the path, for messages.

    Raises:
        DataError: a part is missing; an image has no label; a line of `labels` names no image, or
            an image gets two classes; a class is in the validation part only; or there is only one
            class.
    """
    parts = [open_source(part) for part in _find_parts(path, option)]
    named = _read_labels(labels) if labels else None
    if named is not None:
        used: set[str] = set()
        names = [_labels_by_name(source, named, labels or "", used) for source in parts]
        if unused := [name for name in named if name not in used]:
            raise DataError(
                f"{labels} labels {len(unused)} images that are not in {path} "
                f"({examples(unused)}): remove these lines, or give the file of this set"
            )
    else:
        names = [_labels_of(source, option) for source in parts]
    classes = sorted(set(names[0]))
    if unknown := sorted(set(names[1]) - set(classes)):
        raise DataError(
            f"{path}: {len(unknown)} classes are in the validation part only "
            f"({examples(unknown)}), so that no classifier can learn them: add training images of "
            "these classes or remove them"
        )
    if len(classes) < 2:
        raise DataError(
            f"{path}: all images have the same class ({classes[0]}), so that every answer is "
            "right: put the images of each class into a folder of its own directly below the "
            f"training and the validation part{_or_labels(option)}"
        )
    if say is not None:
        counts = f"{len(names[0]):,} images to train, {len(names[1]):,} to test"
        say(f"{len(classes):,} classes; {counts}")
        for source in parts:
            for line in source.left_out.lines():
                say(line)
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
    """Returns the longest end of an image's path that is in `listed`, or None.

    Only whole parts of the path count: `b/c.png` is an end of `a/b/c.png`, `c.png` is too, `png` is
    not.
    """
    parts = name.split(os.sep)
    ends = (os.sep.join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in listed), None)


def _find_parts(path: str, option: str) -> tuple[str, str]:
    root = Path(path)
    if "," in path and not root.is_dir():  # a folder may have commas in its name
        return _split(path)
    if not root.is_dir():
        raise DataError(
            f"{option}{path} is not a folder with `train` and `val` below it: give such a folder, "
            "or both parts as TRAIN,VAL"
        )
    found = {}
    for part, names in _PARTS.items():
        candidates = [root / name for name in names if (root / name).exists()]
        if not candidates:
            raise DataError(
                f"{option}{path} has no `{part}` below it: an evaluation needs `train` and `val` "
                "with a folder per class in each, or both parts as TRAIN,VAL"
            )
        found[part] = str(candidates[0])
    return found["train"], found["val"]


def _split(path: str) -> tuple[str, str]:
    """Returns both parts of TRAIN,VAL; where parts have commas themselves, the pair that exists."""
    words = path.split(",")
    pairs = [(",".join(words[:at]), ",".join(words[at:])) for at in range(1, len(words))]
    stripped = [(first.strip(), second.strip()) for first, second in pairs]
    there = (pair for pair in [*pairs, *stripped] if all(os.path.exists(part) for part in pair))
    return next(there, pairs[0])


def _or_labels(option: str) -> str:
    """Names the option that gives labels too, where there is one."""
    return ", or give --labels FILE" if option.startswith("--") else ""


def _labels_of(source: Source, option: str) -> list[str]:
    labels = [source.label(index) for index in range(len(source))]
    missing = [source.name(index) for index, label in enumerate(labels) if label is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(labels)} images have no label ({examples(missing)}): put the "
            "images into one folder per class, or put a .cls file beside each image in the shards"
            f"{_or_labels(option)}"
        )
    return [str(label) for label in labels]


def _read_labels(path: str) -> dict[str, str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the labels {path} cannot be read ({error})") from None
    lines = text.splitlines()
    tab = bool(lines) and "\t" in lines[0]
    labels: dict[str, str] = {}
    for number, row in enumerate(csv.reader(lines, delimiter="\t" if tab else ","), start=1):
        if not row or (number == 1 and [cell.strip() for cell in row[:2]] == ["name", "class"]):
            continue
        if len(row) != 2 or not row[0].strip() or not row[1].strip():
            raise DataError(f"the labels {path}, line {number}: {row} is not `name,class`")
        name, label = row[0].strip(), row[1].strip()
        if labels.setdefault(name, label) != label:
            raise DataError(
                f"the labels {path}, line {number}: {name} is labelled {label} here and "
                f"{labels[name]} above: leave one of the two lines"
            )
    if not labels:
        raise DataError(f"the labels {path} are empty: the file needs one `name,class` per line")
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
            f"the labels {path} have no line for {len(missing)} of {len(source)} images "
            f"({examples(missing)}): give the file of these images"
        )
    return found
