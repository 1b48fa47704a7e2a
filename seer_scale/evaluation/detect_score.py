"""COCO's average precision of a detector, computed by pycocotools; each image is judged once.

Lin et al., "Microsoft COCO: Common Objects in Context" (arXiv 1405.0312).
"""

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

Detection = dict[str, Any]  # in COCO's results format
Kind = Literal["bbox", "segm"]

_STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_NAMES: dict[Kind, str] = {"bbox": "box", "segm": "mask"}
_INSIDE = 0.5  # a pixel belongs to a mask above this probability


@torch.inference_mode()
def detect(detector: nn.Module, part: CocoPart, device: torch.device) -> list[Detection]:
    """Detects objects on all images of a part; every rank gets all detections.

    One rank sees each image, in a batch of its own, so that the result does not depend on the
    number of ranks.
    """
    detector.eval()
    mine: list[Detection] = []
    for picture in part.pictures[distributed.rank() :: distributed.world_size()]:
        image = V.to_tensor(picture.read()).to(device)  # [3, H, W] in 0 to 1
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
    """Computes AP over IoU 0.50 to 0.95, at 0.50 and at 0.75, and AP by object size.

    Args:
        part: the images and their true objects.
        detections: the objects found on all images.
        kind: whether the overlap of boxes or of masks counts.

    Returns:
        The numbers by name (`box_ap`, `mask_ap50`, ...) and the AP by category, each from 0 to 1.
        Sizes and categories without a true object are left out.
    """
    name = _NAMES[kind]
    if not detections:
        return {f"{name}_{stat}": 0.0 for stat in _STATS[:3]}, dict.fromkeys(part.names, 0.0)
    from pycocotools.cocoeval import COCOeval

    # Beside a box, loadRes would compute a mask's area from that box.
    wanted = {"image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation"}
    results = [{key: each[key] for key in wanted} for each in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(part.coco, part.coco.loadRes(results), kind)
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
