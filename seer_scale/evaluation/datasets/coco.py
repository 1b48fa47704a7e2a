"""COCO-format data: images with boxes, masks and categories, read and checked at once.

A set is a folder with `train` and `val` below it, and their annotations beside them: either
`annotations/instances_train*.json` and `annotations/instances_val*.json`, or an `annotations.json`
in each part's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seer_scale.data.decode import BadImage, decode
from seer_scale.errors import DataError, UserError

_PARTS = {"train": ("train", "train2017", "train2014"), "val": ("val", "val2017", "val2014")}


@dataclass(frozen=True)
class Instance:
    """One annotated object.

    Attributes:
        box: left, top, right, bottom in pixels.
        label: from 1, in the order of the categories' ids; 0 is the background.
        area: of the object in pixels, by which COCO tells small from large.
        crowd: a group that is not told apart; neither trained on nor counted against.
        mask: COCO's segmentation: polygons, or run lengths; None if there is none.
    """

    box: tuple[float, float, float, float]
    label: int
    area: float
    crowd: bool
    mask: Any


@dataclass(frozen=True)
class Picture:
    """One image and its objects; `id` is COCO's."""

    id: int
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]

    def read(self) -> Image.Image:
        """The image as it was annotated: the file's rows, without EXIF's rotation.

        Raises:
            DataError: if it cannot be read, or has another size than the annotations say.
        """
        try:
            image = decode(self.path.read_bytes())
        except (BadImage, OSError) as error:
            raise DataError(f"{self.path} cannot be used ({error}): remove or replace it") from None
        if image.size == (self.height, self.width) != (self.width, self.height):
            image = _as_stored(self.path)
        if image.size != (self.width, self.height):
            raise DataError(
                f"{self.path} has {image.width} x {image.height} pixels, but its annotations say "
                f"{self.width} x {self.height}: they are of another image"
            )
        return image

    @property
    def singles(self) -> list[Instance]:
        """What is trained on: objects that are told apart, in boxes that are not empty."""
        return [
            instance
            for instance in self.instances
            if not instance.crowd
            and instance.box[2] > instance.box[0]
            and instance.box[3] > instance.box[1]
        ]


@dataclass(frozen=True)
class CocoPart:
    """Images of one annotation file.

    Attributes:
        annotations: the file.
        pictures: in the order of their ids.
        categories: (COCO's id, name) of labels 1, 2, ...
    """

    annotations: Path
    pictures: tuple[Picture, ...]
    categories: tuple[tuple[int, str], ...]

    @cached_property
    def names(self) -> list[str]:
        """Of labels 1, 2, ..."""
        return [name for _, name in self.categories]


def open_coco(path: str, *, masks: bool) -> tuple[CocoPart, CocoPart]:
    """The training and the validation part of a set.

    Args:
        path: folder of the set.
        masks: whether every object needs a segmentation.

    Raises:
        DataError: a folder or file is missing, not readable or no COCO annotations; an image is
            not there; a category is unknown, or differs between parts; or nothing is annotated.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(
            f"--data {path} is no folder with `train`, `val` and `annotations` below it"
        )
    places = [_find(root, part) for part in _PARTS]
    train, val = (read_part(folder, file, masks=masks) for folder, file in places)
    if train.categories != val.categories:
        raise DataError(
            f"{train.annotations} and {val.annotations} have different categories: "
            f"{_few(train.names)} and {_few(val.names)}; both need the same list"
        )
    if not any(picture.singles for picture in train.pictures):
        raise DataError(f"{train.annotations} has no objects: there is nothing to learn from")
    return train, val


def _find(root: Path, part: str) -> tuple[Path, Path]:
    """Folder of images and annotation file."""
    folders = [root / name for name in _PARTS[part] if (root / name).is_dir()]
    if not folders:
        raise DataError(f"--data {root} has no folder `{part}` below it")
    beside = folders[0] / "annotations.json"
    found = sorted((root / "annotations").glob(f"instances_{part}*.json"))
    if beside.is_file():
        return folders[0], beside
    if not found:
        raise DataError(
            f"--data {root} has no annotations of `{part}`: neither "
            f"annotations/instances_{part}*.json nor {beside.relative_to(root)} is there"
        )
    if len(found) > 1:
        raise DataError(
            f"--data {root} has several annotations of `{part}` ({_few([f.name for f in found])}): "
            "leave one"
        )
    return folders[0], found[0]


def read_part(folder: Path, path: Path, *, masks: bool) -> CocoPart:
    """Reads an annotation file; `folder` is where its images are.

    Raises:
        DataError: as `open_coco` does.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images = {int(image["id"]): image for image in content["images"]}
        annotations = content["annotations"]
        categories = sorted((int(c["id"]), str(c["name"])) for c in content["categories"])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no COCO annotation file: {error} is missing") from None
    if not images:
        raise DataError(f"{path} lists no images")
    labels = {number: label for label, (number, _) in enumerate(categories, start=1)}
    instances: dict[int, list[Instance]] = {number: [] for number in images}
    for annotation in annotations:
        try:
            where = f"{path}: annotation {annotation['id']}"
            number, category = int(annotation["image_id"]), int(annotation["category_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: an annotation lacks {error}") from None
        if number not in images:
            raise DataError(f"{where} is of image {number}, which the file does not list")
        if category not in labels:
            raise DataError(
                f"{where} has category {category}, but the categories are "
                f"{_few([f'{i} ({name})' for i, name in categories])}"
            )
        instances[number].append(_instance(annotation, labels[category], where, masks=masks))
    pictures = tuple(
        _picture(folder, path, images[number], tuple(instances[number]))
        for number in sorted(images)
    )
    return CocoPart(path, pictures, tuple(categories))


def _picture(
    folder: Path, path: Path, image: dict[str, Any], instances: tuple[Instance, ...]
) -> Picture:
    try:
        file = folder / str(image["file_name"])
        height, width = int(image["height"]), int(image["width"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: image {image['id']} lacks {error}") from None
    if not file.is_file():
        raise DataError(f"{file} is not there, but {path} lists it")
    return Picture(int(image["id"]), file, height, width, instances)


def _instance(annotation: dict[str, Any], label: int, where: str, *, masks: bool) -> Instance:
    try:
        left, top, width, height = (float(value) for value in annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{where} has no bbox of four numbers") from None
    crowd = bool(annotation.get("iscrowd", 0))
    mask = annotation.get("segmentation") or None
    if masks and mask is None and not crowd:
        raise DataError(
            f"{where} has no segmentation, which Mask R-CNN learns from: set masks=false to train "
            "on boxes alone"
        )
    area = float(annotation.get("area", width * height))
    return Instance((left, top, left + width, top + height), label, area, crowd, mask)


def binary_masks(picture: Picture, instances: Sequence[Instance]) -> Tensor:
    """uint8 [N, H, W] of polygons or run lengths, compressed or not."""
    from pycocotools import mask as rle

    masks: list[NDArray[np.uint8]] = []
    for instance in instances:
        runs = instance.mask
        if isinstance(runs, list):
            runs = rle.merge(rle.frPyObjects(runs, picture.height, picture.width))
        elif isinstance(runs["counts"], list):
            runs = rle.frPyObjects(runs, picture.height, picture.width)
        masks.append(rle.decode(runs))
    if not masks:
        return torch.zeros(0, picture.height, picture.width, dtype=torch.uint8)
    return torch.from_numpy(np.stack(masks))


def need_pycocotools() -> None:
    """Asks for what detection needs before hours of training.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise UserError(f"detection needs pycocotools ({error}): pip install pycocotools") from None


def _as_stored(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
