"""Pooled maps: SEER's sizes, and values against the trunk's own blocks and slow loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seer_scale.errors import ConfigError
from seer_scale.evaluation.maps import cells, map_names, name_of, pooled_maps, probed_maps
from seer_scale.models import TRUNKS, build_trunk

# Numbers in a vector, of VISSL's configs for these networks.
PUBLISHED = {
    "regnety_128gf": {"res4": 8712, "res5": 14784, "avgpool": 7392},
    "regnety_256gf": {"res4": 8206, "res5": 20888, "avgpool": 10444},
    "rg_10b": {"res4": 22220, "res5": 56560, "avgpool": 28280},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_vectors_have_the_published_sizes(name: str) -> None:
    widths = [stage.width for stage in TRUNKS[name].stages]
    channels = {"res4": widths[2], "res5": widths[3], "avgpool": widths[3]}
    for which, size in PUBLISHED[name].items():
        rows, columns = cells(name, which)
        assert channels[which] * rows * columns == size


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


@pytest.mark.parametrize("name", ["regnety_debug", "regnety_200mf", "regnety_16gf"])
def test_a_trunk_is_known_by_its_stages(name: str) -> None:
    trunk = build_trunk(name, device="meta")
    assert name_of(trunk) == name
    stages = len(TRUNKS[name].stages)
    assert probed_maps(trunk) == [f"res{stages}", f"res{stages + 1}", "avgpool"]


def test_every_trunk_has_stages_of_its_own() -> None:
    seen = {tuple((s.depth, s.width) for s in config.stages) for config in TRUNKS.values()}
    assert len(seen) == len(TRUNKS)
    with pytest.raises(ConfigError, match="this Linear is no trunk"):
        name_of(torch.nn.Linear(1, 1))
