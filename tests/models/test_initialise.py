"""Initial values: all of them set, by the published rules, from (seed, name) alone."""

from __future__ import annotations

import math
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seer_scale.models import MultiCropModel, build_model, build_trunk, initialise
from seer_scale.models import regnet as regnet_module
from seer_scale.models.heads import ProjectionHead, Prototypes
from seer_scale.models.initialise import CHUNK, InitRule, init_rules, initial_values


def make_model(**changes: Any) -> MultiCropModel:
    options = {"head_dims": (32, 8), "head_batch_norm": True, "prototypes": 20, **changes}
    return build_model("regnety_debug", **options)


def values(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    initialise(model, seed)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


def test_nothing_is_forgotten() -> None:
    model = make_model()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for _, tensor in tensors:
            tensor.fill_(math.nan if tensor.is_floating_point() else -1)
    initialise(model, seed=0)
    for name, tensor in tensors:
        assert torch.isfinite(tensor).all(), name
        assert not (name.endswith("num_batches_tracked") and tensor != 0), name


def test_values_do_not_depend_on_order_or_on_other_modules() -> None:
    torch.manual_seed(1)
    expected = values(make_model())

    torch.manual_seed(2)
    prototypes = Prototypes(8, 20)
    extra = nn.Linear(3, 3)
    trunk = regnet_module.RegNet(regnet_module.TRUNKS["regnety_debug"])
    head = ProjectionHead(trunk.width, (32, 8), True)
    other = MultiCropModel(trunk, head, prototypes)
    other.extra = extra
    found = values(other)
    del found["extra.weight"], found["extra.bias"]
    assert_same(expected, found)


def test_global_generator_is_neither_read_nor_moved() -> None:
    model = make_model()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    initialise(model, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_seed_and_name_both_matter() -> None:
    first, second = values(make_model(), seed=0), values(make_model(), seed=1)
    drawn = [name for name, rule in init_rules(make_model()).items() if rule.kind != "constant"]
    assert len(drawn) == 46 + 4 + 1  # trunk, head, prototypes
    for name in drawn:
        assert not torch.equal(first[name], second[name]), name
    twins = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    same_shape = values(twins)
    assert not torch.equal(same_shape["a.weight"], same_shape["b.weight"])


def test_materialised_from_meta_equals_built_on_the_device() -> None:
    model = make_model(device="meta").to_empty(device="cpu")
    assert_same(values(model), values(make_model(device="cpu")))


def test_channels_last_and_float64_hold_the_same_values() -> None:
    expected = values(make_model())
    assert_same(expected, values(make_model().to(memory_format=torch.channels_last)))
    wide = values(make_model().double())
    assert_same({k: v.to(expected[k].dtype) for k, v in wide.items()}, expected)


def test_built_trunk_has_the_values_of_seed_zero() -> None:
    trunk = build_trunk("regnety_debug")
    plain = regnet_module.RegNet(regnet_module.TRUNKS["regnety_debug"])
    assert_same(dict(trunk.state_dict()), values(plain))


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(64, 96, 3, groups=8, bias=False), nn.Conv2d(512, 256, 1)],
    ids=["grouped 3x3", "1x1"],
)
def test_convolutions_are_normal_with_fan_out_not_divided_by_groups(layer: Any) -> None:
    weight = values(layer)["weight"]
    kernel = layer.kernel_size[0] * layer.kernel_size[1]
    std = math.sqrt(2 / (kernel * layer.out_channels))
    # Four standard errors of a sample's mean, standard deviation and fourth moment.
    count = weight.numel()
    assert abs(weight.mean()) < 4 * std / math.sqrt(count)
    assert abs(weight.std() / std - 1) < 4 / math.sqrt(2 * count)
    assert abs((weight / std).pow(4).mean() - 3) < 4 * math.sqrt(96 / count)


@pytest.mark.parametrize(
    ("layer", "leaf", "fan_in"),
    [
        (nn.Conv2d(16, 4096, 1), "bias", 16),
        (nn.Conv2d(16, 4096, 3, groups=2), "bias", 72),
        (nn.Linear(64, 4096), "weight", 64),
        (nn.Linear(64, 4096), "bias", 64),
    ],
)
def test_the_rest_is_uniform_as_in_torch(layer: Any, leaf: Any, fan_in: Any) -> None:
    """torch's own reset_parameters is the oracle for the bound."""
    bound = 1 / math.sqrt(fan_in)
    torch.manual_seed(0)
    layer.reset_parameters()
    default = getattr(layer, leaf).detach().clone()
    found = values(layer)[leaf]
    for tensor in (default, found):
        assert tensor.abs().max() <= bound
        assert tensor.abs().max() > 0.99 * bound
        # Four standard errors of a uniform sample's mean and standard deviation.
        count = tensor.numel()
        assert abs(tensor.mean()) < 4 * bound / math.sqrt(3 * count)
        assert abs(tensor.std() * math.sqrt(3) / bound - 1) < 4 * math.sqrt(0.2 / count)


def test_batch_norm_starts_as_the_identity() -> None:
    for leaf, expected in {
        "weight": 1,
        "bias": 0,
        "running_mean": 0,
        "running_var": 1,
        "num_batches_tracked": 0,
    }.items():
        tensor = values(nn.BatchNorm2d(5))[leaf]
        assert torch.equal(tensor, torch.full_like(tensor, expected)), leaf


def test_prototypes_are_directions_spread_over_the_sphere() -> None:
    weight = values(Prototypes(16, 4000))["weight"]
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(4000))
    assert weight.mean(0).norm() < 4 / math.sqrt(4000)


def test_bound_of_the_prototypes_before_they_are_normalised() -> None:
    assert init_rules(Prototypes(16, 4))["weight"] == InitRule("uniform", 0.25, unit_rows=16)


class ForeignSyncBatchNorm(nn.Module):
    """A synchronised BatchNorm that does not derive from torch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), math.nan))
        self.bias = nn.Parameter(torch.full((width,), math.nan))
        self.register_buffer("running_mean", torch.full((width,), math.nan))
        self.register_buffer("running_var", torch.full((width,), math.nan))


@pytest.mark.parametrize("layer", [nn.SyncBatchNorm(4), ForeignSyncBatchNorm(4)])
def test_replacements_of_batch_norm_get_the_same_values(layer: Any) -> None:
    found = values(layer)
    for name, tensor in values(nn.BatchNorm2d(4)).items():
        assert name not in found or torch.equal(found[name], tensor)
    assert {"weight", "bias", "running_mean", "running_var"} <= found.keys()


def test_unknown_tensors_are_refused_by_name() -> None:
    model = make_model()
    model.head.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match=r"head\.scale"):
        initialise(model, seed=0)
    model = make_model()
    model.trunk.stem[0].register_buffer("mask", torch.ones(1))
    with pytest.raises(TypeError, match=r"trunk\.stem\.0\.mask"):
        initialise(model, seed=0)


def test_tensors_without_memory_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trunk\.stem\.0\.weight has no memory"):
        initialise(make_model(device="meta"), seed=0)
    partitioned = nn.Linear(4, 4)
    partitioned.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="weight has no memory"):
        initialise(partitioned, seed=0)


@pytest.mark.parametrize(
    "rule",
    [
        InitRule("normal", 0.3),
        InitRule("uniform", 0.5, unit_rows=24),
        InitRule("constant", 1.0),
    ],
)
@pytest.mark.parametrize("parts", [1, 3, 7])
def test_slices_put_together_are_the_whole(
    rule: Any, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("seer_scale.models.initialise"), "CHUNK", 100)
    size = 24 * 29
    whole = initial_values(rule, name="w", size=size, seed=5)
    edges = [size * part // parts for part in range(parts + 1)]
    slices = [
        initial_values(rule, name="w", size=size, seed=5, start=start, stop=stop)
        for start, stop in pairwise(edges)
    ]
    assert torch.equal(torch.cat(slices), whole)
    assert len(whole.unique()) > size * 0.9 or rule.kind == "constant"
    if rule.unit_rows:
        torch.testing.assert_close(whole.view(-1, 24).norm(dim=1), torch.ones(29))


def test_slices_across_real_chunks() -> None:
    rule, size = InitRule("normal", 1.0), CHUNK + 1000
    whole = initial_values(rule, name="w", size=size, seed=0)
    part = initial_values(rule, name="w", size=size, seed=0, start=CHUNK - 7, stop=CHUNK + 13)
    assert torch.equal(part, whole[CHUNK - 7 : CHUNK + 13])
    assert initial_values(rule, name="w", size=size, seed=0, start=0, stop=0).numel() == 0


def test_values_stay_what_they_were() -> None:
    """Recorded runs can be repeated only while these numbers stay."""
    uniform = initial_values(InitRule("uniform", 1.0), name="w", size=32, seed=0)[:3]
    normal = initial_values(InitRule("normal", 1.0), name="w", size=32, seed=0)[:3]
    assert uniform.tolist() == pytest.approx([-0.376998, 0.346142, -0.167465], abs=1e-5)
    assert normal.tolist() == pytest.approx([0.336259, -0.047518, 0.821566], abs=1e-5)


def test_every_chunk_of_a_large_tensor_has_values_of_its_own() -> None:
    rule = InitRule("normal", 1.0)
    first, second = (
        initial_values(rule, name="a", size=2 * CHUNK, seed=0, start=start, stop=start + 8)
        for start in (0, CHUNK)
    )
    assert not torch.equal(first, second)
