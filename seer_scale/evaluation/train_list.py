"""A given subset of the training images: a file of names, as low-shot splits are published."""

from __future__ import annotations

import os
from pathlib import Path

from seer_scale.errors import DataError
from seer_scale.evaluation.labelled import LabelledImages


def select(images: LabelledImages, path: str) -> LabelledImages:
    """Those of `images` that a file lists, in the order of the images.

    Args:
        images: to choose from.
        path: a text file, one name a line: a file's name, or its path from any folder on.

    Raises:
        DataError: if the file cannot be read, lists nothing, or names what is not there.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"train_list={path} cannot be read ({error})") from None
    listed = {line.strip() for line in lines if line.strip()}
    if not listed:
        raise DataError(f"train_list={path} is empty: it needs an image's name per line")
    chosen, found = [], set()
    for position, index in enumerate(images.indices):
        parts = images.source.name(int(index)).split(os.sep)
        ends = (os.sep.join(parts[start:]) for start in range(len(parts)))
        if (end := next((end for end in ends if end in listed), None)) is not None:
            chosen.append(position)
            found.add(end)
    if missing := sorted(listed - found):
        raise DataError(
            f"train_list={path} names {len(missing)} images that are not in the training part "
            f"({', '.join(missing[:3])}): it is the list of another set"
        )
    return images.subset(chosen)
