"""The trunks against SEER's published sizes and against torchvision's own RegNet."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from seer_scale.errors import ConfigError
from seer_scale.models import TRUNKS, RegNetConfig, build_trunk
from seer_scale.models.layers import PointwiseConv
from seer_scale.models.regnet import Block, RegNet

# depths, widths, groups per stage, parameters, tensors of the state dict, BatchNorm layers
SEER = {
    "regnety_8gf": ((2, 4, 10, 1), (168, 448, 896, 2016), (3, 8, 16, 36), 37_163_068, 404, 56),
    "regnety_16gf": ((2, 4, 11, 1), (224, 448, 1232, 3024), (2, 4, 11, 27), 80_565_140, 426, 59),
    "regnety_32gf": ((2, 5, 12, 1), (232, 696, 1392, 3712), (1, 3, 6, 16), 141_333_770, 470, 65),
    "regnety_64gf": ((2, 5, 12, 1), (328, 984, 1968, 4920), (1, 3, 6, 15), 276_457_786, 470, 65),
    "regnety_128gf": ((2, 7, 17, 1), (528, 1056, 2904, 7392), (2, 4, 11, 28), 637_419_894, 624, 86),
    "regnety_256gf": (
        (2, 7, 17, 1),
        (746, 1492, 4103, 10444),
        (2, 4, 11, 28),
        1_272_156_138,
        624,
        86,
    ),
    "rg_10b": ((2, 7, 17, 1), (2020, 4040, 11110, 28280), (2, 4, 11, 28), 9_323_934_872, 624, 86),
}
# Squeeze widths of a stage's first block (from the previous stage's width) and of the others.
SQUEEZE = {
    "regnety_256gf": [(8, 186), (186, 373), (373, 1026), (1026, None)],
    "rg_10b": [(8, 505), (505, 1010), (1010, 2778), (2778, None)],
}
# Where torchvision's width rule gives the same network.
TORCHVISION = ["400mf", "1_6gf", "3_2gf", "16gf", "32gf", "128gf"]


def torchvision_trunk(size: str, device: str) -> nn.Module:
    """torchvision's network without classifier; its width arithmetic cannot run on meta."""
    build = torchvision.models.regnet._regnet

    def build_on_device(*args: Any, **kwargs: Any) -> nn.Module:
        with torch.device(device):
            module: nn.Module = build(*args, **kwargs)
            return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models.regnet, "_regnet", build_on_device)
        twin: nn.Module = getattr(torchvision.models, f"regnet_y_{size}")(weights=None)
    twin.fc = nn.Identity()
    return twin


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", SEER)
def test_published_architecture_to_the_last_parameter(name: Any) -> None:
    depths, widths, groups, parameters, tensors, batch_norms = SEER[name]
    trunk: Any = build_trunk(name, "meta")
    stages = TRUNKS[name].stages
    assert tuple(stage.depth for stage in stages) == depths
    assert tuple(stage.width for stage in stages) == widths
    assert tuple(stage.groups for stage in stages) == groups
    assert [len(stage) for stage in trunk.blocks()] == list(depths)
    assert [[block.f.b[0].groups for block in stage] for stage in trunk.blocks()] == [
        [count] * depth for count, depth in zip(groups, depths, strict=True)
    ]
    assert trunk.width == widths[-1]
    assert parameter_count(trunk) == parameters
    assert len(trunk.state_dict()) == tensors
    assert sum(isinstance(module, nn.BatchNorm2d) for module in trunk.modules()) == batch_norms


@pytest.mark.parametrize("name", SQUEEZE)
def test_squeeze_width_follows_the_block_input_and_rounds_halves_to_even(name: Any) -> None:
    trunk: Any = build_trunk(name, "meta")
    for stage, (first, others) in zip(trunk.blocks(), SQUEEZE[name], strict=True):
        found = [block.f.se.fc1.out_channels for block in stage]
        assert found == [first, *[others] * (len(stage) - 1)]


def test_parameters_of_each_stage_of_rg_10b() -> None:
    trunk = build_trunk("rg_10b", "meta")
    assert parameter_count(trunk.stem) == 928
    assert [parameter_count(stage) for stage in trunk.trunk_output] == [
        51_199_433,
        538_825_405,
        6_891_322_928,
        1_842_586_178,
    ]


def test_every_stage_halves_the_resolution() -> None:
    for name, config in TRUNKS.items():
        trunk: Any = build_trunk(name, "meta")
        for stage in trunk.blocks():
            assert [block.f.b[0].stride for block in stage] == [(2, 2)] + [(1, 1)] * (
                len(stage) - 1
            )
            assert [block.proj is not None for block in stage] == [True] + [False] * (
                len(stage) - 1
            )
        assert len(config.stages) == (3 if name == "regnety_debug" else 4)


@pytest.mark.parametrize(
    ("name", "depths", "widths", "published_millions"),
    [
        ("regnety_200mf", [1, 1, 4, 7], [24, 56, 152, 368], 3.2),
        ("regnety_400mf", [1, 3, 6, 6], [48, 104, 208, 440], 4.3),
        ("regnety_800mf", [1, 3, 8, 2], [64, 128, 320, 768], 6.3),
        ("regnety_1_6gf", [2, 6, 17, 2], [48, 120, 336, 888], 11.2),
        ("regnety_3_2gf", [2, 5, 13, 1], [72, 216, 576, 1512], 19.4),
    ],
)
def test_small_trunks_against_the_regnet_paper(
    name: Any, depths: Any, widths: Any, published_millions: Any
) -> None:
    """Published counts include a classifier of 1000 classes."""
    assert [stage.depth for stage in TRUNKS[name].stages] == depths
    assert [stage.width for stage in TRUNKS[name].stages] == widths
    classifier = (widths[-1] + 1) * 1000
    millions = (parameter_count(build_trunk(name, "meta")) + classifier) / 1e6
    assert round(millions, 1) == published_millions


def test_debug_trunk_is_small() -> None:
    assert parameter_count(build_trunk("regnety_debug", "meta")) == 233_178


@pytest.mark.parametrize("size", TORCHVISION)
def test_tensors_have_torchvision_names_and_shapes(size: Any) -> None:
    ours = build_trunk(f"regnety_{size}", "meta").state_dict()
    theirs = torchvision_trunk(size, "meta").state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


@pytest.mark.parametrize(
    ("size", "ours", "theirs"),
    [
        ("800mf", [64, 128, 320, 768], [64, 144, 320, 784]),
        ("8gf", [168, 448, 896, 2016], [224, 448, 896, 2016]),
    ],
)
def test_torchvision_rounds_two_networks_otherwise(size: Any, ours: Any, theirs: Any) -> None:
    twin: Any = torchvision_trunk(size, "meta")
    assert [stage[0].f.c[0].out_channels for stage in twin.trunk_output] == theirs
    assert [stage.width for stage in TRUNKS[f"regnety_{size}"].stages] == ours


@pytest.mark.parametrize("training", [True, False])
def test_features_equal_torchvision(training: Any) -> None:
    twin = torchvision_trunk("400mf", "cpu").train(training).double()
    trunk = build_trunk("regnety_400mf").train(training).double()
    trunk.load_state_dict(twin.state_dict())
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    features = trunk(images)
    assert features.shape == (4, trunk.width)
    # In float64, since squeeze-and-excitation sums in another order.
    torch.testing.assert_close(features, twin(images), rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(trunk.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", TRUNKS)
def test_builds_on_meta_in_under_a_second(name: Any) -> None:
    # Processor time: the wall clock would measure whatever else this machine is doing.
    start = time.process_time()
    trunk = build_trunk(name, "meta")
    assert time.process_time() - start < 1.0
    assert all(tensor.is_meta for tensor in trunk.state_dict().values())


def test_default_device_is_honoured() -> None:
    with torch.device("meta"):
        assert next(build_trunk("regnety_debug").parameters()).is_meta
    assert next(build_trunk("regnety_debug").parameters()).device.type == "cpu"


def test_built_trunk_is_the_same_each_time_and_its_features_are_finite() -> None:
    torch.manual_seed(1)
    first = build_trunk("regnety_debug")
    torch.manual_seed(2)
    second = build_trunk("regnety_debug")
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], rtol=0, atol=0)
    assert torch.isfinite(first(torch.randn(2, 3, 32, 32))).all()


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("regnety_16g", "regnety_16gf"), ("rg10b", "rg_10b")]
)
def test_unknown_trunk_names_the_nearest_and_all(wrong: Any, nearest: Any) -> None:
    with pytest.raises(ConfigError) as error:
        build_trunk(wrong, "meta")
    assert f"{wrong!r}" in str(error.value)
    assert f"did you mean {nearest}?" in str(error.value)
    assert all(name in str(error.value) for name in TRUNKS)


def test_unknown_trunk_like_no_other_still_lists_all() -> None:
    with pytest.raises(
        ConfigError, match="'vit' is not a known trunk; known trunks: regnety_debug"
    ):
        build_trunk("vit")


@pytest.mark.parametrize(
    "change", [{"depth": 0}, {"w_0": 30}, {"w_a": -1.0}, {"w_m": 1.0}, {"se_ratio": 0.0}]
)
def test_impossible_generator_is_refused(change: Any) -> None:
    good: dict[str, Any] = {"depth": 6, "w_0": 24, "w_a": 24.48, "w_m": 2.54, "group_width": 8}
    RegNetConfig(**good)
    with pytest.raises(ConfigError, match="is not a RegNetY"):
        RegNetConfig(**{**good, **change})


def test_group_wider_than_a_stage_shrinks_to_it() -> None:
    config = RegNetConfig(depth=6, w_0=24, w_a=24.48, w_m=2.54, group_width=40)
    assert [(s.width, s.group_width) for s in config.stages] == [(24, 24), (80, 40), (160, 40)]
    with torch.device("meta"):
        assert RegNet(config).width == 160


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_pointwise_convolution_is_a_matrix_product_in_channels_last(size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, size, size, dtype=torch.float64)
    found = []
    for kind in (nn.Conv2d, PointwiseConv):
        torch.manual_seed(1)
        layer = kind(6, 10, 1, bias=False, dtype=torch.float64)
        own = x.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
        y = layer(own)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.square().sum().backward()
        found.append((y, own.grad, layer.weight.grad))
        if size > 1:  # of one pixel both formats are the same; else contiguous: torch's own
            assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_block_keeps_channels_last_with_one_thread_and_few_images() -> None:
    trunk = build_trunk("regnety_debug").train()
    seen = []
    for module in trunk.trunk_output.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda layer, inputs, y: seen.append((inputs[0], y)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trunk(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    finally:
        torch.set_num_threads(threads)
    shortcuts = [module for module in trunk.modules() if isinstance(module, Block) and module.proj]
    assert len(seen) == 3 * 6 + len(shortcuts)
    for x, y in seen:
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.channels_last)
