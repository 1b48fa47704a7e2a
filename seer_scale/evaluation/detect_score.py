"""What detections are worth: COCO's average precision, by pycocotools, each image judged once."""

from __future__ import annotations

import contextlib
import io
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import functional as V

from seer_scale import distributed
from seer_scale.evaluation.datasets.coco import CocoPart, Picture

Detection = dict[str, Any]  # of COCO's results format
Kind = Literal["bbox", "segm"]

_STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_NAMES: dict[Kind, str] = {"bbox": "box", "segm": "mask"}
_INSIDE = 0.5  # probability from which on a pixel belongs to a mask


@torch.inference_mode()
def detect(detector: nn.Module, part: CocoPart, device: torch.device) -> list[Detection]:
    """Detections on every image of a part, on every rank; each image is seen by one rank, alone.

    So they do not depend on the number of ranks.
    """
    detector.eval()
    mine: list[Detection] = []
    for picture in part.pictures[distributed.rank() :: distributed.world_size()]:
        image = V.to_tensor(picture.read()).to(device)  # [3, H, W] of 0 to 1
        (found,) = detector([image])
        mine.extend(_as_coco(picture, part, {name: x.cpu() for name, x in found.items()}))
    return distributed.gather_lists(mine)


def _as_coco(picture: Picture, part: CocoPart, found: dict[str, Tensor]) -> list[Detection]:
    from pycocotools import mask as rle

    detections: list[Detection] = []
    for index, (box, label) in enumerate(
        zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True)
    ):
        left, top, right, bottom = box
        detection = {
            "image_id": picture.id,
            "category_id": part.categories[label - 1][0],
            "bbox": [left, top, right - left, bottom - top],
            "score": float(found["scores"][index]),
        }
        if "masks" in found:
            inside = (found["masks"][index, 0] > _INSIDE).numpy().astype(np.uint8)
            detection["segmentation"] = rle.encode(np.asfortranarray(inside))
        detections.append(detection)
    return detections


def average_precision(
    part: CocoPart, detections: list[Detection], kind: Kind
) -> tuple[dict[str, float], dict[str, float]]:
    """AP over IoU 0.50 to 0.95, at 0.50 and 0.75, and by size: `box_ap`, `mask_ap50`, ...

    Args:
        part: what is there.
        detections: what was found, of all images.
        kind: whose overlap counts: boxes' or masks'.

    Returns:
        The numbers, sizes that do not occur left out, and AP by category.
    """
    name = _NAMES[kind]
    if not detections:
        return {f"{name}_{stat}": 0.0 for stat in _STATS[:3]}, dict.fromkeys(part.names, 0.0)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # With a box, loadRes would take an object's area from it.
    wanted = {"image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation"}
    results = [{key: each[key] for key in wanted} for each in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = _ground_truth(part)
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    numbers = {
        f"{name}_{stat}": float(value)
        for stat, value in zip(_STATS, judge.stats[:6], strict=True)
        if value >= 0
    }
    precision = judge.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category]
    by_category = {
        category: float(values[values > -1].mean())
        for category, values in zip(part.names, np.moveaxis(precision, 2, 0), strict=True)
        if (values > -1).any()
    }
    return numbers, by_category


def _ground_truth(part: CocoPart) -> dict[str, Any]:
    """The annotations as pycocotools wants them, with all the fields it asks for."""
    annotations: list[dict[str, Any]] = []
    for picture in part.pictures:
        for instance in picture.instances:
            left, top, right, bottom = instance.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": picture.id,
                    "category_id": part.categories[instance.label - 1][0],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": instance.area,
                    "iscrowd": int(instance.crowd),
                    "segmentation": instance.mask or [],
                }
            )
    return {
        "info": {},
        "images": [
            {"id": picture.id, "height": picture.height, "width": picture.width}
            for picture in part.pictures
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in part.categories],
    }
