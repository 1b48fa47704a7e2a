"""COCO-format data: images with boxes, masks and categories, all checked when the set is opened.

A set is a folder with the image folders `train` and `val`. The annotations are either
`annotations/instances_train*.json` and `annotations/instances_val*.json` beside them, or an
`annotations.json` inside each image folder.

The checked annotations stay in pycocotools' own `COCO` object: training reads its targets from it,
and average precision is computed against it. torchvision's wrapped `CocoDetection` does not replace
the reading here: it keeps crowds, empty boxes and COCO's category numbers with their gaps, needs a
mask for every crowd, adds up box corners in float32, and has no sentence for a damaged image.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seer_scale.data.decode import BadImage, decode
from seer_scale.errors import DataError, UserError, examples

if TYPE_CHECKING:
    from pycocotools.coco import COCO

_PARTS = {"train": ("train", "train2017", "train2014"), "val": ("val", "val2017", "val2014")}

Annotation = dict[str, Any]
"""One object in COCO's format, with all of `bbox`, `area`, `iscrowd` and `segmentation` set."""


@dataclass(frozen=True)
class Picture:
    """One image and its objects.

    Attributes:
        id: COCO's number of the image.
        path: the image file.
        height: rows of the image, in pixels.
        width: columns of the image, in pixels.
        annotations: every object of the image, crowds included.
    """

    id: int
    path: Path
    height: int
    width: int
    annotations: tuple[Annotation, ...]

    def read(self) -> Image.Image:
        """Reads the image as it was annotated: the file's rows, without EXIF's rotation.

        Raises:
            DataError: the file cannot be read, or has another size than the annotations say.
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
    def singles(self) -> list[Annotation]:
        """The objects to train on: no crowds, no empty boxes."""
        return [annotation for annotation in self.annotations if _is_single(annotation)]


@dataclass(frozen=True)
class CocoPart:
    """The images and objects of one annotation file.

    Attributes:
        annotations: the annotation file.
        coco: pycocotools' object with the checked annotations.
        pictures: the images, sorted by their ids.
        categories: (COCO's id, name), sorted by id. A detector's label of a category is its place
            here, counted from 1; label 0 is the background.
    """

    annotations: Path
    coco: COCO
    pictures: tuple[Picture, ...]
    categories: tuple[tuple[int, str], ...]

    @cached_property
    def with_objects(self) -> list[Picture]:
        """The pictures that have an object to train on."""
        return [picture for picture in self.pictures if picture.singles]

    @cached_property
    def names(self) -> list[str]:
        """Names of the categories, in the order of the labels 1, 2, ..."""
        return [name for _, name in self.categories]

    @cached_property
    def labels(self) -> dict[int, int]:
        """Label of each category, by COCO's id."""
        return {number: label for label, (number, _) in enumerate(self.categories, start=1)}

    def masks(self, picture: Picture, annotations: Sequence[Annotation]) -> Tensor:
        """Draws the masks uint8 [N, H, W] of N objects of a picture."""
        masks = np.zeros((len(annotations), picture.height, picture.width), np.uint8)
        for mask, annotation in zip(masks, annotations, strict=True):
            mask[:] = self.coco.annToMask(annotation)
        return torch.from_numpy(masks)


def corners(annotation: Annotation) -> tuple[float, float, float, float]:
    """Returns left, top, right and bottom of an object's box, in pixels."""
    left, top, width, height = annotation["bbox"]
    return left, top, left + width, top + height


def open_coco(path: str, *, masks: bool) -> tuple[CocoPart, CocoPart]:
    """Opens and checks the training part and the validation part of a set.

    Args:
        path: folder of the set.
        masks: whether every object needs a segmentation.

    Raises:
        DataError: a folder, file or image is missing; a file cannot be read or has no COCO
            annotations; a category is unknown, or differs between the parts; or no object is
            annotated.
        UserError: pycocotools is not installed.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(
            f"--data {path} is not a folder with `train`, `val` and `annotations` below it"
        )
    places = [_find(root, part) for part in _PARTS]
    train, val = (read_part(folder, file, masks=masks) for folder, file in places)
    if train.categories != val.categories:
        raise DataError(
            f"{train.annotations} and {val.annotations} have different categories: "
            f"{examples(train.names)} and {examples(val.names)}; both need the same list"
        )
    if not train.with_objects:
        raise DataError(f"{train.annotations} has no objects: there is nothing to learn from")
    return train, val


def _find(root: Path, part: str) -> tuple[Path, Path]:
    """Returns the image folder and the annotation file of a part."""
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
            f"--data {root} has several annotations of `{part}` "
            f"({examples([f.name for f in found])}): leave one"
        )
    return folders[0], found[0]


def read_part(folder: Path, path: Path, *, masks: bool) -> CocoPart:
    """Reads and checks the annotation file `path`; its images are in `folder`.

    Raises:
        DataError: as `open_coco` does.
        UserError: pycocotools is not installed.
    """
    try:
        content = json.loads(path.read_bytes())
        images = {int(image["id"]): image for image in content["images"]}
        annotations = content["annotations"]
        categories = sorted((int(c["id"]), str(c["name"])) for c in content["categories"])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not a COCO annotation file: {error} is missing") from None
    if not images:
        raise DataError(f"{path} lists no images")
    known = dict(categories)
    for number, annotation in enumerate(annotations, start=1):
        try:
            where = f"{path}: annotation {annotation['id']}"
            pictured, category = int(annotation["image_id"]), int(annotation["category_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: an annotation lacks {error}") from None
        if pictured not in images:
            raise DataError(f"{where} is of image {pictured}, which the file does not list")
        if category not in known:
            raise DataError(
                f"{where} has category {category}, but the categories are "
                f"{examples([f'{i} ({name})' for i, name in categories])}"
            )
        # COCOeval takes the id 0 for "not matched", and an id that stands twice for one object.
        annotation.update(id=number, image_id=pictured, category_id=category)
        _complete(annotation, where, masks=masks)
    for number, image in images.items():
        try:
            file = folder / str(image["file_name"])
            image.update(id=number, height=int(image["height"]), width=int(image["width"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: image {number} lacks {error}") from None
        if not file.is_file():
            raise DataError(f"{file} is missing, but {path} lists it")
    coco = _index(list(images.values()), annotations, known)
    pictures = tuple(
        Picture(
            number,
            folder / str(image["file_name"]),
            image["height"],
            image["width"],
            tuple(coco.imgToAnns[number]),
        )
        for number, image in sorted(coco.imgs.items())
    )
    return CocoPart(path, coco, pictures, tuple(categories))


def _complete(annotation: Annotation, where: str, *, masks: bool) -> None:
    """Checks an annotation and sets the fields that COCOeval asks for."""
    try:
        left, top, width, height = (float(value) for value in annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{where} has no bbox of four numbers") from None
    crowd = int(bool(annotation.get("iscrowd", 0)))
    mask = annotation.get("segmentation") or []
    if masks and not mask and not crowd:
        raise DataError(
            f"{where} has no segmentation, which Mask R-CNN learns from: set masks=false to train "
            "on boxes alone"
        )
    area = float(annotation.get("area", width * height))
    annotation.update(bbox=[left, top, width, height], area=area, iscrowd=crowd, segmentation=mask)


def _index(
    images: list[dict[str, Any]], annotations: list[Annotation], categories: dict[int, str]
) -> COCO:
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise UserError(f"detection needs pycocotools ({error}): pip install pycocotools") from None
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    return coco


def _is_single(annotation: Annotation) -> bool:
    left, top, right, bottom = corners(annotation)
    return not annotation["iscrowd"] and right > left and bottom > top


def _as_stored(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
