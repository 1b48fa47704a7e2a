"""Mask R-CNN with a feature pyramid on a trunk's stages, built from torchvision's parts.

Mask R-CNN: He et al. (arXiv 1703.06870). Feature pyramid: Lin et al. (arXiv 1612.03144). Every
stage feeds the pyramid, as in VISSL's configurations for SEER.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from seer_scale.models.regnet import RegNet
from seer_scale.parallel.convert_batchnorm import convert_sync_batchnorm
from seer_scale.preprocessing import MEAN, STD

MASK_LAYERS = 4
RATIOS = (0.5, 1.0, 2.0)


def build_detector(
    trunk: RegNet,
    *,
    classes: int,
    masks: bool,
    sync: bool,
    channels: int,
    anchors: Sequence[int],
    rois: int,
    min_sizes: Sequence[int],
    max_size: int,
) -> nn.Module:
    """Builds a detector that shares its weights with `trunk`.

    The detector takes a list of images float32 [3, H, W] in 0 to 1.

    Args:
        trunk: the backbone; changed in place.
        classes: number of categories, without the background.
        masks: whether to build Mask R-CNN; if false, Faster R-CNN.
        sync: whether BatchNorm runs over all ranks, also in the pyramid. If false, the trunk's
            BatchNorm is frozen and the pyramid has none.
        channels: channels of the pyramid and the mask head; the box head has four times as many.
        anchors: anchor sizes in pixels, one per level, finest level first, the pooled level last.
            A trunk with fewer stages uses the first ones.
        rois: proposals per image that train the heads.
        min_sizes: shorter sides that a training image may get, in pixels; a test image gets the
            last one.
        max_size: limit of the longer side, in pixels.
    """
    stages = trunk.trunk_output._modules
    body = nn.Sequential(OrderedDict([("stem", trunk.stem), *stages.items()]))
    names = {stage: str(level) for level, stage in enumerate(stages)}
    widths = [stage[-1].f.c[1].num_features for stage in trunk.stages()]  # type: ignore[union-attr, index]
    backbone = BackboneWithFPN(
        body, names, widths, channels, norm_layer=nn.BatchNorm2d if sync else None
    )
    levels = list(names.values())
    sizes = tuple((size,) for size in anchors[: len(levels) + 1])
    box_channels = 4 * channels
    parts: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        "box_roi_pool": MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        "box_head": TwoMLPHead(channels * 7**2, box_channels),
        "box_predictor": FastRCNNPredictor(box_channels, classes + 1),
        "box_batch_size_per_image": rois,
    }
    if masks:
        parts |= {
            "mask_roi_pool": MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
            "mask_head": MaskRCNNHeads(channels, (channels,) * MASK_LAYERS, 1),
            "mask_predictor": MaskRCNNPredictor(channels, channels, classes + 1),
        }
    detector: nn.Module = (MaskRCNN if masks else FasterRCNN)(
        backbone,
        min_size=tuple(min_sizes),
        max_size=max_size,
        image_mean=list(MEAN),
        image_std=list(STD),
        **parts,
    )
    if sync:
        convert_sync_batchnorm(detector, 0)
    else:
        for norm in _norms(detector):
            norm.requires_grad_(False)
    return detector


def train_mode(detector: nn.Module) -> None:
    """Sets training mode; frozen BatchNorm stays in eval mode and keeps its statistics."""
    detector.train()
    for norm in _norms(detector):
        if norm.weight is not None and not norm.weight.requires_grad:
            norm.eval()


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]
