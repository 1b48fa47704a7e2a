"""A file of names that selects training images, as low-shot splits are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seer_scale.errors import DataError, examples
from seer_scale.evaluation.datasets.labelled import LabelledImages, listed_end


def read_names(path: str, images: LabelledImages) -> NDArray[np.int64]:
    """Returns the positions of the images that a file lists, int64 [M] in rising order.

    Args:
        path: a text file with one name per line: the name of an image file, as in ImageNet's
            published lists, or the end of its path.
        images: images to choose from.

    Raises:
        DataError: the file cannot be read, is empty, or names an image that is not in `images`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"train_list {path} cannot be read ({error})") from None
    listed = {line.strip() for line in lines if line.strip()}
    if not listed:
        raise DataError(f"train_list {path} is empty: it needs the name of one image per line")
    chosen, found = [], set()
    for position, index in enumerate(images.indices.tolist()):
        if (end := listed_end(images.source.name(index), listed)) is not None:
            chosen.append(position)
            found.add(end)
    if missing := sorted(listed - found):
        raise DataError(
            f"train_list {path} names {len(missing)} images that are not in the training part "
            f"({examples(missing)}): give the list of this set"
        )
    return np.array(chosen, dtype=np.int64)
