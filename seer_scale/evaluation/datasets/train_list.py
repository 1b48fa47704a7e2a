"""A given subset of the training images: a file of names, as low-shot splits are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seer_scale.errors import DataError
from seer_scale.evaluation.datasets.labelled import LabelledImages, listed_end


def read_names(path: str, images: LabelledImages) -> NDArray[np.int64]:
    """Rising positions of the images that a file lists.

    Args:
        path: a text file, one name a line: a file's name (as ImageNet's published lists have it),
            or its path from any folder on.
        images: to choose from.

    Raises:
        DataError: if the file cannot be read, lists nothing, or names what is not there.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"train_list {path} cannot be read ({error})") from None
    listed = {line.strip() for line in lines if line.strip()}
    if not listed:
        raise DataError(f"train_list {path} is empty: one image's name per line is needed")
    chosen, found = [], set()
    for position, index in enumerate(images.indices.tolist()):
        if (end := listed_end(images.source.name(index), listed)) is not None:
            chosen.append(position)
            found.add(end)
    if missing := sorted(listed - found):
        raise DataError(
            f"train_list {path} names {len(missing)} images that are not in the training part "
            f"({', '.join(missing[:3])}): it is the list of another set"
        )
    return np.array(chosen, dtype=np.int64)
