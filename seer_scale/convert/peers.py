"""Config files with which timm and Hugging Face rebuild a trunk."""

from __future__ import annotations

from typing import Any

from seer_scale.data.middle_crop import TEST_SHARE
from seer_scale.errors import UserError
from seer_scale.models.regnet import trunk_config
from seer_scale.preprocessing import MEAN, STD

# timm's names of the same networks; its default rounding of widths is SEER's.
TIMM = {
    "regnety_200mf": "regnety_002",
    "regnety_400mf": "regnety_004",
    "regnety_800mf": "regnety_008",
    "regnety_1_6gf": "regnety_016",
    "regnety_3_2gf": "regnety_032",
    "regnety_8gf": "regnety_080",
    "regnety_16gf": "regnety_160",
    "regnety_32gf": "regnety_320",
    "regnety_64gf": "regnety_640",
    "regnety_128gf": "regnety_1280",
    "regnety_256gf": "regnety_2560",
}
_TIMM_BASE = "regnety_2560"  # for the others, which `model_args` describe
_TIMM_STAGES = 4

# torchvision builds these by name; the others are `RegNet(BlockParams(...))`.
TORCHVISION = {
    "regnety_400mf": "regnet_y_400mf",
    "regnety_1_6gf": "regnet_y_1_6gf",
    "regnety_3_2gf": "regnet_y_3_2gf",
    "regnety_16gf": "regnet_y_16gf",
    "regnety_32gf": "regnet_y_32gf",
    "regnety_128gf": "regnet_y_128gf",
}


def timm_config(trunk: str, classes: int, size: int) -> dict[str, Any]:
    """config.json of a folder that `timm.create_model("local-dir:FOLDER")` loads.

    Args:
        trunk: key of `TRUNKS`.
        classes: number of classes of the classifier; 0 for none.
        size: side of the crop in pixels that images are shown at.

    Raises:
        UserError: if timm cannot build such a network.
    """
    config = trunk_config(trunk)
    if len(config.stages) != _TIMM_STAGES:
        raise UserError(
            f"timm builds RegNets of {_TIMM_STAGES} stages only and {trunk} has "
            f"{len(config.stages)}; convert it to huggingface, torchvision or vissl"
        )
    described = {}
    if trunk not in TIMM:
        described["model_args"] = {
            "w0": config.w_0,
            "wa": config.w_a,
            "wm": config.w_m,
            "group_size": config.group_width,
            "depth": config.depth,
            "stem_width": config.stem_width,
            "se_ratio": config.se_ratio,
        }
    return {
        "architecture": TIMM.get(trunk, _TIMM_BASE),
        "num_classes": classes,
        "num_features": config.stages[-1].width,
        "global_pool": "avg",
        **described,
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [3, size, size],
            "pool_size": [-(-size // 32), -(-size // 32)],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": _crop_share(size),
            "crop_mode": "center",
            "mean": MEAN,
            "std": STD,
            "first_conv": "stem.conv",
            "classifier": "head.fc",
        },
    }


def huggingface_config(trunk: str, classes: int, dtype: str) -> dict[str, Any]:
    """config.json of a folder that `RegNetModel.from_pretrained` loads."""
    config = trunk_config(trunk)
    labels = {str(index): f"LABEL_{index}" for index in range(classes)}
    return {
        "architectures": ["RegNetForImageClassification" if classes else "RegNetModel"],
        "model_type": "regnet",
        "num_channels": 3,
        "embedding_size": config.stem_width,
        "hidden_sizes": [stage.width for stage in config.stages],
        "depths": [stage.depth for stage in config.stages],
        "groups_width": config.group_width,
        "layer_type": "y",
        "hidden_act": "relu",
        "downsample_in_first_stage": True,
        "dtype": dtype,
        **({"id2label": labels} if classes else {}),
    }


def huggingface_preprocessor(size: int) -> dict[str, Any]:
    """preprocessor_config.json: shorter side to 256/224 of `size`, `size` from its centre.

    From 384 pixels on, Hugging Face's class shows the whole image in a square instead.
    """
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "crop_pct": _crop_share(size),
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }


def _crop_share(size: int) -> float:
    """Side of the crop over the shorter side before: 7/8, or what rounds to the same pixels.

    Both libraries round the shorter side down; ours is rounded to the nearest pixel.
    """
    shorter = round(size * TEST_SHARE)
    return 0.875 if int(size / 0.875) == shorter else size / (shorter + 0.25)
