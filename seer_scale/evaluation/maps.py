"""Feature maps inside a trunk, pooled to vectors: what probes and retrieval look at.

VISSL's linear evaluation pools the maps of the last two stages to a few cells, so that a vector has
around ten thousand numbers; the cells of SEER's networks are those of its published configs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.errors import ConfigError
from seer_scale.models import TRUNKS
from seer_scale.models.regnet import RegNet

AVGPOOL = "avgpool"
GEM_POWER = 3.0  # Radenovic et al., arXiv 1711.02512
_REGION_LEVELS = 3  # Tolias et al., arXiv 1511.05879
_REGION_OVERLAP = 0.4
_WHOLE = ("gem", "rmac")  # of the last stage
_EPSILON = 1e-6

# Cells (height, width) of the pooled maps, by trunk.
_CELLS = {
    "regnety_128gf": {"res4": (3, 1), "res5": (2, 1)},  # 8712 and 14784 numbers
    "regnety_256gf": {"res4": (2, 1), "res5": (1, 2)},  # 8206 and 20888
    "rg_10b": {"res4": (2, 1), "res5": (2, 1)},  # 22220 and 56560
}
_OTHER_CELLS = (2, 1)  # nothing is published for the others


def name_of(trunk: nn.Module) -> str:
    """Key of `TRUNKS` of a trunk, by its stages.

    Raises:
        ConfigError: if it is none of them.
    """
    if isinstance(trunk, RegNet):
        depths = [len(stage) for stage in trunk.blocks()]
        for name, config in TRUNKS.items():
            stages = config.stages
            if depths == [stage.depth for stage in stages] and trunk.width == stages[-1].width:
                return name
    raise ConfigError(f"this {type(trunk).__name__} is no trunk of TRUNKS: {', '.join(TRUNKS)}")


def map_names(trunk: nn.Module) -> list[str]:
    """The maps that a trunk has: `res2` for the first stage and so on, and pooled ones."""
    return [*(f"res{stage + 2}" for stage in range(len(_stages(trunk)))), AVGPOOL, *_WHOLE]


def probed_maps(trunk: nn.Module) -> list[str]:
    """What VISSL probes: the last two stages and `avgpool`."""
    count = len(_stages(trunk))
    return [f"res{count}", f"res{count + 1}", AVGPOOL]


def check_maps(trunk: nn.Module, maps: list[str]) -> None:
    """Refuses maps that the trunk lacks.

    Raises:
        ConfigError: naming those it has.
    """
    known = map_names(trunk)
    for name in maps:
        if name not in known:
            raise ConfigError(f"maps has {name}, but this trunk has {', '.join(known)}")


def cells(trunk_name: str, name: str) -> tuple[int, int]:
    """Cells (height, width) that the map `name` is pooled to."""
    if not name.startswith("res"):
        return 1, 1
    return _CELLS.get(trunk_name, {}).get(name, _OTHER_CELLS)


def pooled_maps(
    trunk: nn.Module, images: Tensor, names: list[str], trunk_name: str
) -> dict[str, Tensor]:
    """Vectors float32 [B, channels * cells] of the maps `names`, in one pass through the trunk.

    Args:
        trunk: in eval mode.
        images: [B, 3, H, W], normalised.
        names: of `map_names`.
        trunk_name: key of `TRUNKS`, which tells the cells.
    """
    if names == [AVGPOOL]:
        return {AVGPOOL: trunk(images).float()}
    found: dict[str, Tensor] = {}
    assert isinstance(trunk, RegNet)
    features: Tensor = trunk.stem(images)
    for number, stage in enumerate(_stages(trunk), start=2):
        features = stage(features)
        if (name := f"res{number}") in names:
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


def _regional_maxima(features: Tensor) -> Tensor:
    """R-MAC without whitening: the sum of unit vectors of maxima over square regions [B, C]."""
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
    """Evenly spaced places of regions of `side` that overlap by about `_REGION_OVERLAP`."""
    if length <= side:
        return [0]
    count = max(2, round((length - side * _REGION_OVERLAP) / (side * (1 - _REGION_OVERLAP))))
    return sorted({round(place) for place in torch.linspace(0, length - side, count).tolist()})


def _stages(trunk: nn.Module) -> list[nn.Module]:
    assert isinstance(trunk, RegNet)
    return list(trunk.stages())
