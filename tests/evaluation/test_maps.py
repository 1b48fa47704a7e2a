"""Pooled maps: SEER's sizes, and values against the trunk's own blocks and slow loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seer_scale.errors import ConfigError
from seer_scale.evaluation.maps import (
    cells,
    check_maps,
    map_names,
    name_of,
    pooled_maps,
    probed_maps,
)
from seer_scale.models import TRUNKS, build_trunk

# VISSL's benchmark/linear_image_classification/*/models/regnet*.yaml, line by line: the map, its
# AdaptiveAvgPool2d, and the length that the head is given (`mlp` is a head without BatchNorm).
_8GF = "res4 3x3 8064, res5 6x1 12096, avgpool 1x1 2016"
_16GF = "res4 3x3 11088, res5 4x1 12096, avgpool 1x1 3024"
_32GF = "res4 7x1 9744, res5 3x1 11136, avgpool 1x1 3712"
_64GF = "res4 5x1 9840, res5 2x1 9840, avgpool 1x1 4920"
_128GF = "res4 3x1 8712, res5 2x1 14784, avgpool 1x1 7392"
_256GF = "res4 2x1 8206, res5 1x2 20888, avgpool 1x1 10444"
_10B = (
    "res4 2x1 22220, res4 1x2 22220, res5 2x1 56560, res5 1x2 56560, avgpool 1x1 28280, "
    "avgpool mlp 28280"
)
PUBLISHED = {
    ("imagenet", "regnety_8gf"): _8GF,
    ("imagenet", "regnety_16gf"): f"{_16GF}, avgpool mlp 3024",
    ("imagenet", "regnety_32gf"): f"{_32GF}, avgpool mlp 3712",
    ("imagenet", "regnety_64gf"): f"{_64GF}, avgpool mlp 4920",
    ("imagenet", "regnety_128gf"): f"{_128GF}, avgpool mlp 7392",
    ("imagenet", "regnety_256gf"): _256GF,
    ("imagenet", "rg_10b"): _10B,
    ("places205", "regnety_8gf"): _8GF,
    ("places205", "regnety_16gf"): _16GF,
    ("places205", "regnety_32gf"): _32GF,
    ("places205", "regnety_64gf"): _64GF,
    ("places205", "regnety_128gf"): _128GF,
    ("places205", "regnety_256gf"): _256GF,
    ("places205", "rg_10b"): _10B,
    ("inat18", "regnety_8gf"): _8GF,
    ("inat18", "regnety_16gf"): "res4 3x3 11088, res5 2x2 12096, avgpool 1x1 3024",
    ("inat18", "regnety_32gf"): "res4 1x6 8352, res5 2x2 14848, avgpool 1x1 3712",
    ("inat18", "regnety_64gf"): "res4 1x5 9840, res5 2x1 9840, avgpool 1x1 4920",
    ("inat18", "regnety_128gf"): _128GF,
    ("inat18", "regnety_256gf"): _256GF,
    ("inat18", "rg_10b"): _10B,
}


@pytest.mark.parametrize(("benchmark", "name"), PUBLISHED)
def test_heads_are_the_published_ones(benchmark: str, name: str) -> None:
    trunk = build_trunk(name, device="meta")
    widths = [stage.width for stage in TRUNKS[name].stages]
    channels = {"res4": widths[2], "res5": widths[3], "avgpool": widths[3]}
    found = []
    for head in probed_maps(trunk, name, benchmark):
        plain = head.endswith("_plain")
        map_name = head.removesuffix("_plain")
        check_maps(trunk, [map_name])
        rows, columns = cells(name, map_name)
        stage = map_name.partition("_")[0]
        kind = "mlp" if plain else f"{rows}x{columns}"
        found.append(f"{stage} {kind} {channels[stage] * rows * columns}")
    assert ", ".join(found) == PUBLISHED[benchmark, name]


def test_a_stage_takes_the_cells_behind_its_name() -> None:
    trunk = build_trunk("regnety_debug").eval()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        names = ["res3", "res3_1x2", "res3_3x4"]
        found = pooled_maps(trunk, images, names, "regnety_debug")
        x = trunk.stem(images)
        first, second, *_ = trunk.stages()
        x = second(first(x))  # [2, C, 12, 12]
        halves = torch.stack([half.mean((2, 3)) for half in x.chunk(2, dim=3)], dim=2)
        torch.testing.assert_close(found["res3_1x2"], halves.flatten(1))
        tiles = x.unflatten(2, (3, 4)).unflatten(4, (4, 3)).mean((3, 5))
        torch.testing.assert_close(found["res3_3x4"], tiles.flatten(1))
    assert list(found) == names
    for wrong in ("res3_0x2", "res9_1x2", "avgpool_2x1"):
        with pytest.raises(ConfigError, match=f"maps has {wrong}, but this trunk has res2"):
            check_maps(trunk, [wrong])


def test_values_are_those_of_the_stages() -> None:
    trunk = build_trunk("regnety_debug").eval()
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    names = [name for name in map_names(trunk) if name != "rmac"]
    with torch.inference_mode():
        found = pooled_maps(trunk, images, names, "regnety_debug")
        x = trunk.stem(images)
        for number, stage in enumerate(trunk.stages(), start=2):
            x = stage(x)
            halves = torch.stack([half.mean((2, 3)) for half in x.chunk(2, dim=2)], dim=2)
            torch.testing.assert_close(found[f"res{number}"], halves.flatten(1))
        torch.testing.assert_close(found["avgpool"], trunk(images))
        gem = x.clamp(min=1e-6).double().pow(3).mean((2, 3)).pow(1 / 3).float()
        torch.testing.assert_close(found["gem"], gem)
        alone = pooled_maps(trunk, images, ["avgpool"], "regnety_debug")["avgpool"]
    torch.testing.assert_close(alone, found["avgpool"])


def test_regional_maxima_of_a_map_of_one_cell_are_its_direction() -> None:
    trunk = build_trunk("regnety_debug").eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = pooled_maps(trunk, images, ["rmac", "avgpool"], "regnety_debug")
    torch.testing.assert_close(
        F.normalize(found["rmac"], dim=1), F.normalize(found["avgpool"], dim=1)
    )


def test_regional_maxima_of_a_map_of_six_by_four_cells() -> None:
    trunk = build_trunk("regnety_debug").eval()
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(2))
    # By hand (arXiv 1511.05879, section 3.1): sides 2 * 4 / (level + 1), rounded down, and starts
    # from edge to edge in steps of about 0.6 of a side.
    levels = [(4, (0, 2), (0,)), (2, (0, 1, 3, 4), (0, 1, 2)), (2, (0, 1, 3, 4), (0, 1, 2))]
    with torch.inference_mode():
        x = trunk.stem(images)
        for stage in trunk.stages():
            x = stage(x)
        assert x.shape[2:] == (6, 4)
        regions = [x] + [
            x[:, :, top : top + side, left : left + side]
            for side, tops, lefts in levels
            for top in tops
            for left in lefts
        ]
        maxima = [region.flatten(2).max(2).values for region in regions]
        expected = torch.stack([most / most.square().sum(1, True).sqrt() for most in maxima]).sum(0)
        found = pooled_maps(trunk, images, ["rmac"], "regnety_debug")["rmac"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["regnety_debug", "regnety_200mf", "regnety_16gf"])
def test_a_trunk_is_known_by_its_stages(name: str) -> None:
    trunk = build_trunk(name, device="meta")
    assert name_of(trunk) == name
    stages = len(TRUNKS[name].stages)
    last = [f"res{stages}", f"res{stages + 1}", "avgpool"]
    assert probed_maps(trunk, name, "places205") == last


def test_every_trunk_has_stages_of_its_own() -> None:
    seen = {tuple((s.depth, s.width) for s in config.stages) for config in TRUNKS.values()}
    assert len(seen) == len(TRUNKS)
    with pytest.raises(ConfigError, match="this Linear is not one of the trunks"):
        name_of(torch.nn.Linear(1, 1))
