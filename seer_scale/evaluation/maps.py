"""Feature maps of a trunk, pooled to vectors for linear probes and retrieval.

VISSL's linear evaluation pools the maps of the last two stages to a few cells, so that a vector has
about ten thousand numbers. The cells of SEER's networks come from its published configurations,
`benchmark/linear_image_classification`. A name may give its cells: `res4_1x6`.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.errors import ConfigError
from seer_scale.models import TRUNKS
from seer_scale.models.regnet import RegNet

AVGPOOL = "avgpool"
GEM_POWER = 3.0  # generalised-mean pooling: Radenovic et al., arXiv 1711.02512
_REGION_LEVELS = 3  # R-MAC: Tolias et al., arXiv 1511.05879
_REGION_OVERLAP = 0.4
_WHOLE = ("gem", "rmac")  # pooled from the last stage
_EPSILON = 1e-6

# Cells (height, width) that `res4` and `res5` are pooled to, of VISSL's configurations for ImageNet
# and Places205; behind each, the length of its vectors.
_CELLS = {
    "regnety_8gf": {"res4": (3, 3), "res5": (6, 1)},  # 8064, 12096
    "regnety_16gf": {"res4": (3, 3), "res5": (4, 1)},  # 11088, 12096
    "regnety_32gf": {"res4": (7, 1), "res5": (3, 1)},  # 9744, 11136
    "regnety_64gf": {"res4": (5, 1), "res5": (2, 1)},  # 9840, 9840
    "regnety_128gf": {"res4": (3, 1), "res5": (2, 1)},  # 8712, 14784
    "regnety_256gf": {"res4": (2, 1), "res5": (1, 2)},  # 8206, 20888
    "rg_10b": {"res4": (2, 1), "res5": (2, 1)},  # 22220, 56560
}
_OTHER_CELLS = (2, 1)  # for other trunks nothing is published
PLAIN = "_plain"  # behind the name of a map: its head has no BatchNorm

# Maps of the last two stages that are probed, where they are not `res4` and `res5` of `_CELLS`.
_BOTH_WAYS = ("res4", "res4_1x2", "res5", "res5_1x2")
_PROBED: dict[str, dict[str, tuple[str, ...]]] = {
    "imagenet": {"rg_10b": _BOTH_WAYS},
    "places205": {"rg_10b": _BOTH_WAYS},
    "inat18": {
        "regnety_16gf": ("res4", "res5_2x2"),
        "regnety_32gf": ("res4_1x6", "res5_2x2"),
        "regnety_64gf": ("res4_1x5", "res5"),
        "rg_10b": _BOTH_WAYS,
    },
}
# Trunks whose `avgpool` gets a second head, without BatchNorm.
_TWO_HEADS = {
    "imagenet": ("regnety_16gf", "regnety_32gf", "regnety_64gf", "regnety_128gf", "rg_10b"),
    "places205": ("rg_10b",),
    "inat18": ("rg_10b",),
}


def name_of(trunk: nn.Module) -> str:
    """Finds a trunk's key in `TRUNKS` by its stages.

    Raises:
        ConfigError: no entry of `TRUNKS` has these stages.
    """
    if isinstance(trunk, RegNet):
        depths = [len(stage) for stage in trunk.blocks()]
        for name, config in TRUNKS.items():
            stages = config.stages
            if depths == [stage.depth for stage in stages] and trunk.width == stages[-1].width:
                return name
    raise ConfigError(f"this {type(trunk).__name__} is not one of the trunks {', '.join(TRUNKS)}")


def map_names(trunk: nn.Module) -> list[str]:
    """Lists the maps of a trunk: `res2` for the first stage and so on, then the pooled ones."""
    return [*(f"res{stage + 2}" for stage in range(len(_stages(trunk)))), AVGPOOL, *_WHOLE]


def probed_maps(trunk: nn.Module, trunk_name: str, benchmark: str) -> list[str]:
    """Lists the heads that VISSL trains: maps of the last two stages, and `avgpool`.

    Args:
        trunk: the trunk to probe.
        trunk_name: key of `TRUNKS`.
        benchmark: `imagenet`, `places205` or `inat18`.
    """
    count = len(_stages(trunk))
    stages = _PROBED[benchmark].get(trunk_name, (f"res{count}", f"res{count + 1}"))
    second = [AVGPOOL + PLAIN] if trunk_name in _TWO_HEADS[benchmark] else []
    return [*stages, AVGPOOL, *second]


def check_maps(trunk: nn.Module, maps: list[str]) -> None:
    """Checks that the trunk has these maps.

    Raises:
        ConfigError: a map is unknown; the sentence names the known ones.
    """
    known = map_names(trunk)
    for name in maps:
        if _split(name)[0] not in known:
            raise ConfigError(
                f"maps has {name}, but this trunk has {', '.join(known)}; a stage may have its "
                "cells behind it, as res4_3x1"
            )


def cells(trunk_name: str, name: str) -> tuple[int, int]:
    """Returns the cells (height, width) that the map `name` is pooled to."""
    stage, given = _split(name)
    if not stage.startswith("res"):
        return 1, 1
    return given or _CELLS.get(trunk_name, {}).get(stage, _OTHER_CELLS)


def _split(name: str) -> tuple[str, tuple[int, int] | None]:
    """Splits `res4_3x1` into `res4` and (3, 1); None without cells."""
    found = re.fullmatch(r"(res\d)_([1-9]\d?)x([1-9]\d?)", name)
    return (found[1], (int(found[2]), int(found[3]))) if found else (name, None)


def pooled_maps(
    trunk: nn.Module, images: Tensor, names: list[str], trunk_name: str
) -> dict[str, Tensor]:
    """Computes the maps `names` in one pass through the trunk and pools them.

    Args:
        trunk: a trunk in eval mode.
        images: normalised images [B, 3, H, W].
        names: maps to compute, from `map_names`; a stage may have its cells behind it.
        trunk_name: key of `TRUNKS`, which selects the cells.

    Returns:
        Vectors float32 [B, channels * cells] by map.
    """
    if names == [AVGPOOL]:
        return {AVGPOOL: trunk(images).float()}
    found: dict[str, Tensor] = {}
    assert isinstance(trunk, RegNet)
    features: Tensor = trunk.stem(images)
    for number, stage in enumerate(_stages(trunk), start=2):
        features = stage(features)
        for name in names:
            if _split(name)[0] == f"res{number}":
                pooled = F.adaptive_avg_pool2d(features.float(), cells(trunk_name, name))
                found[name] = pooled.flatten(1)
    last = features.float()
    for name in names:
        if name == AVGPOOL:
            found[name] = last.mean((2, 3))
        elif name == "gem":
            found[name] = last.clamp(min=_EPSILON).pow(GEM_POWER).mean((2, 3)).pow(1 / GEM_POWER)
        elif name == "rmac":
            found[name] = _regional_maxima(last)
    return {name: found[name] for name in names}


@torch.inference_mode()
def map_widths(
    trunk: nn.Module, size: int, names: list[str], trunk_name: str, device: torch.device
) -> dict[str, int]:
    """Numbers in a vector of each map, from one pass of a blank image of side `size`.

    Raises:
        ConfigError: the trunk lacks one of the maps.
    """
    check_maps(trunk, names)
    blank = torch.zeros(1, 3, size, size, device=device)
    return {
        name: vectors.shape[1]
        for name, vectors in pooled_maps(trunk, blank, names, trunk_name).items()
    }


def _regional_maxima(features: Tensor) -> Tensor:
    """Computes R-MAC without whitening [B, C]: the summed unit vectors of regional maxima."""
    height, width = features.shape[2:]
    total = F.normalize(features.amax((2, 3)), dim=1)
    for level in range(1, _REGION_LEVELS + 1):
        side = max(1, 2 * min(height, width) // (level + 1))
        for top in _starts(height, side):
            for left in _starts(width, side):
                region = features[:, :, top : top + side, left : left + side]
                total = total + F.normalize(region.amax((2, 3)), dim=1)
    return total


def _starts(length: int, side: int) -> list[int]:
    """Returns evenly spaced starts of regions of `side` that overlap by `_REGION_OVERLAP`."""
    if length <= side:
        return [0]
    count = max(2, round((length - side * _REGION_OVERLAP) / (side * (1 - _REGION_OVERLAP))))
    return sorted({round(place) for place in torch.linspace(0, length - side, count).tolist()})


def _stages(trunk: nn.Module) -> list[nn.Module]:
    assert isinstance(trunk, RegNet)
    return list(trunk.stages())
