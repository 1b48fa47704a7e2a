"""The images and labels among the files of a tar shard, as WebDataset groups them.

The files of a sample share a key, which ends at the first dot of the base name: `000123.jpg`,
`000123.json`, `000123.cls`. The names that people give their photographs have dots too
(`IMG_2019.06.1.jpg`): a sample may have several images.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence

from seer_scale.data.image_kinds import (
    FOREIGN,
    HIDDEN,
    IMAGE_SUFFIXES,
    LeftOut,
    has_image_suffix,
    is_foreign,
    is_image,
)
from seer_scale.data.tar_members import Member

_FURTHER = "further images of a sample that has one"
_FIELD = re.compile(r"[a-z_][\w-]*\.", re.ASCII)  # `seg.` of `0001.seg.png`
_LABEL = ".cls"


def find_samples(
    members: Sequence[Member], head: Callable[[Member], bytes], left_out: LeftOut
) -> list[tuple[Member, Member | None]]:
    """Finds the images, and for each the member that holds its label, in the order of the samples.

    If a sample has an image of the plain name `0001.jpg`, then `0001.seg.png` and `0001.png` beside
    it are left out. All other images are used, also those that share a name.

    Args:
        members: the files of the shard.
        head: reads the first bytes of a file.
        left_out: takes the images that are not used.
    """
    images: dict[str, list[Member]] = {}
    labels: dict[str, list[Member]] = {}
    for member in members:
        folder, base = os.path.split(member.name)
        if base.startswith(".") or not base:
            if has_image_suffix(base) or base.lower() in IMAGE_SUFFIXES:
                left_out.add(HIDDEN, [member.name])
            continue
        # Samples are in the order of their first member, whatever it is.
        found = images.setdefault(_key(member.name), [])
        stem, suffix = os.path.splitext(base)
        if suffix.lower() == _LABEL:
            labels.setdefault(os.path.join(folder, stem), []).append(member)
        elif is_image(base, lambda: head(member)):  # noqa: B023 - called at once
            found.append(member)
        elif is_foreign(base):
            left_out.add(FOREIGN, [member.name])
    samples: list[tuple[Member, Member | None]] = []
    for key, found in images.items():
        earlier: Counter[str] = Counter()
        for member in _used(found, left_out):
            stem = os.path.splitext(member.name)[0]
            known = labels.get(stem) or labels.get(key) or []
            # Joined shards may repeat a name: each image has the label that was joined with it.
            label = known[earlier[stem]] if earlier[stem] < len(known) else None
            earlier[stem] += 1
            samples.append((member, label))
    return samples


def _key(name: str) -> str:
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def _ending(member: Member) -> str:
    """Returns what follows the first dot of the base name, in lower case."""
    return os.path.basename(member.name).partition(".")[2].lower()


def _used(images: list[Member], left_out: LeftOut) -> list[Member]:
    """Returns the images of one sample that are used."""
    plain = next((_ending(image) for image in images if "." not in _ending(image)), None)
    used = []
    for image in images:
        ending = _ending(image)
        beside = ending != plain if "." not in ending else _FIELD.match(ending) is not None
        if plain is not None and beside:
            left_out.add(_FURTHER, [image.name])
        else:
            used.append(image)
    return used
