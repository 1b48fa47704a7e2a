"""Published hyperparameters by name, for `--preset NAME`; `key=value` overrides a preset.

The keys are those of the task's `Options`. This file imports no torch, so that `--help` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """The options that a published protocol gives a task; `about` is a line of help."""

    task: str
    about: str
    options: dict[str, Any] = field(default_factory=dict)


# VISSL benchmark/linear_image_classification/imagenet1k: frozen trunk, random resized crops of 224
# with flips, test 256 -> 224, BatchNorm and linear layer on pooled maps, SGD with Nesterov momentum
# 0.9, weight decay 5e-4 (not on BatchNorm), 32 x 8 images.
_LINEAR = {
    "base_lr": [0.01],
    "lr_gamma": 0.1,
    "weight_decay": 5e-4,
    "momentum": 0.9,
    "nesterov": True,
    "batch": 256,
    "size": 224,
    "augment": True,
    "solver": "sgd",
}

# VISSL benchmark/fulltune/imagenet1k: SGD with Nesterov momentum, no weight decay.
_FINETUNE = {
    "epochs": 105,
    "base_lr": 0.1,
    "lr_steps": [30, 60, 90, 100],
    "lr_gamma": 0.1,
    "schedule": "step",
    "weight_decay": 0.0,
    "momentum": 0.9,
    "nesterov": True,
    "batch": 256,
    "size": 224,
    "test_size": 224,
}

# VISSL benchmark/semi_supervised: the learning rate for SimCLR's splits; other splits use 0.01.
# The published models keep the first layer of the projection head; these presets do not.
_LOWSHOT = {**_FINETUNE, "epochs": 70, "base_lr": 0.05, "lr_steps": [30]}

PRESETS: dict[str, Preset] = {
    # Wu et al., arXiv 1805.01978, section 3.4; the sweep over k is usual in self-supervised work.
    "knn": Preset(
        "knn",
        "weighted k-NN, best of five k, temperature 0.07",
        {"k": [10, 20, 50, 100, 200], "temperature": [0.07], "size": 224, "map": "avgpool"},
    ),
    "imagenet_linear": Preset(
        "linear",
        "ImageNet: 28 epochs, steps at 8, 16, 24",
        {**_LINEAR, "epochs": 28, "lr_steps": [8, 16, 24]},
    ),
    # VISSL benchmark/linear_image_classification/places205
    "places205_linear": Preset(
        "linear",
        "Places205: 14 epochs, steps at 4, 8, 12",
        {**_LINEAR, "epochs": 14, "lr_steps": [4, 8, 12], "benchmark": "places205"},
    ),
    # VISSL benchmark/linear_image_classification/inaturalist18
    "inat18_linear": Preset(
        "linear",
        "iNaturalist 2018: 84 epochs, steps at 24, 48, 72",
        {**_LINEAR, "epochs": 84, "lr_steps": [24, 48, 72], "benchmark": "inat18"},
    ),
    "imagenet_1pct": Preset(
        "lowshot",
        "ImageNet, fine-tuned on 1 % of the labels",
        {"fractions": [0.01], "method": "finetune", "finetune": _LOWSHOT},
    ),
    "imagenet_10pct": Preset(
        "lowshot",
        "ImageNet, fine-tuned on 10 % of the labels",
        {"fractions": [0.1], "method": "finetune", "finetune": _LOWSHOT},
    ),
    # VISSL benchmark/linear_image_classification/voc07: SVMs on features normalised to length 1.
    "voc07_svm": Preset(
        "svm",
        "VOC 2007: costs by 3-fold cross-validation",
        {
            "costs": [0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000],
            "folds": 3,
            "positive_weight": 2.0,
            "max_iter": 2000,
            "size": 224,
        },
    ),
    # VISSL's instance retrieval: each original queries its strongly changed copies.
    "copydays": Preset(
        "retrieval",
        "CopyDays: originals find their strong copies",
        {"protocol": "copydays", "copies": "strong"},
    ),
    "imagenet_finetune": Preset(
        "finetune", "ImageNet at 224: 105 epochs, steps at 30, 60, 90, 100", _FINETUNE
    ),
    # SEER (arXiv 2103.01988): 35 epochs, batches of 256, learning rate 0.0125 then 0.00125, weight
    # decay 1e-4; and VISSL's transforms/tricks_384_swav.yaml: crops of 384 with SwAV's colour
    # distortion and blur, test 384 -> 384. The epoch of the step is unpublished; 30 is our guess.
    "imagenet_finetune_384": Preset(
        "finetune",
        "ImageNet at 384 as SEER: 35 epochs, strong augmentation",
        {
            **_FINETUNE,
            "epochs": 35,
            "base_lr": 0.0125,
            "lr_steps": [30],
            "weight_decay": 1e-4,
            "size": 384,
            "test_size": 384,
            "test_resize": 384,
            "bicubic": True,
            "colour_distortion": 1.0,
            "blur": 0.5,
        },
    ),
    # VISSL benchmark/fulltune/inaturalist2018
    "inat18_finetune": Preset(
        "finetune",
        "iNaturalist 2018: 24 epochs, steps at 7, 14, 21",
        {**_FINETUNE, "epochs": 24, "lr_steps": [7, 14, 21]},
    ),
    # VISSL benchmark/fulltune/places205
    "places205_finetune": Preset(
        "finetune", "Places205: 105 epochs, steps at 30, 60, 90, 100", _FINETUNE
    ),
    # VISSL's Detectron2 configs: Mask R-CNN with FPN on all four stages, SyncBN.
    "coco_maskrcnn": Preset(
        "detect",
        "COCO: Mask R-CNN with FPN, 90k iterations",
        {
            "iterations": 90_000,
            "lr": 0.02,
            "lr_steps": [60_000, 80_000],
            "warmup": 100,
            "batch": 16,
            "batch_norm": "sync",
        },
    ),
}
