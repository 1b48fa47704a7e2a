"""RegNetY trunks from 200 MF to RG-10B: the sizes, and a trunk built of torchvision's own blocks.

Design space: RegNet (arXiv 2003.13678). Widths are rounded to groups as in SEER (arXiv 2103.01988)
and the RegNet paper. torchvision rounds halves up and never down by more than a tenth, so two of
its networks are others: 800 MF (second stage 144, here 128) and 8 GF (first stage 224, here 168).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torchvision.models.regnet import AnyStage, ResBottleneckBlock, SimpleStemIN

from seer_scale.errors import ConfigError, suggestion
from seer_scale.models.initialise import initialise
from seer_scale.models.layers import Conv, Excitation, PointwiseConv, layer_by_layer
from seer_scale.models.padding import Padding

QUANTUM = 8  # block widths before grouping are multiples of this
STRIDE = 2  # of the first block of every stage, the first stage too


class Stage(NamedTuple):
    """A stage of `depth` blocks of one width; 3x3 convolutions have groups of `group_width`."""

    depth: int
    width: int
    group_width: int

    @property
    def groups(self) -> int:
        """Groups of the stage's 3x3 convolutions."""
        return self.width // self.group_width


@dataclass(frozen=True)
class RegNetConfig:
    """A RegNetY by its generator: block widths grow as `w_0 + w_a * i`, in steps of factor `w_m`.

    Raises:
        ConfigError: for numbers that describe no network.
    """

    depth: int
    w_0: int
    w_a: float
    w_m: float
    group_width: int
    se_ratio: float = 0.25
    stem_width: int = 32

    def __post_init__(self) -> None:
        sizes = min(self.depth, self.w_0, self.group_width, self.stem_width)
        if sizes < 1 or self.w_0 % QUANTUM or self.w_a < 0 or self.w_m <= 1 or self.se_ratio <= 0:
            raise ConfigError(
                f"{self} is not a RegNetY: depth, group_width, stem_width and se_ratio must be "
                f"positive, w_0 a positive multiple of {QUANTUM}, w_a >= 0 and w_m > 1."
            )

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, stem side first (RegNet section 3.3; four in every published network).

        Plain Python numbers, because tensor arithmetic has no values on the meta device. Python
        and torch both round halves to even, which some widths depend on.
        """
        widths = []
        for block in range(self.depth):
            linear = self.w_0 + self.w_a * block
            exponent = round(math.log(linear / self.w_0) / math.log(self.w_m))
            widths.append(round(self.w_0 * self.w_m**exponent / QUANTUM) * QUANTUM)
        stages = []
        for width, blocks in groupby(widths):
            group_width = min(self.group_width, width)
            fitted = round(width / group_width) * group_width
            stages.append(Stage(len(list(blocks)), fitted, group_width))
        return tuple(stages)


TRUNKS: dict[str, RegNetConfig] = {
    # Three stages and 0.23M parameters: small crops keep a feature map of more than one pixel.
    "regnety_debug": RegNetConfig(depth=6, w_0=24, w_a=24.48, w_m=2.54, group_width=8),
    "regnety_200mf": RegNetConfig(depth=13, w_0=24, w_a=36.44, w_m=2.49, group_width=8),
    "regnety_400mf": RegNetConfig(depth=16, w_0=48, w_a=27.89, w_m=2.09, group_width=8),
    "regnety_800mf": RegNetConfig(depth=14, w_0=56, w_a=38.84, w_m=2.4, group_width=16),
    "regnety_1_6gf": RegNetConfig(depth=27, w_0=48, w_a=20.71, w_m=2.65, group_width=24),
    "regnety_3_2gf": RegNetConfig(depth=21, w_0=80, w_a=42.63, w_m=2.66, group_width=24),
    "regnety_8gf": RegNetConfig(depth=17, w_0=192, w_a=76.82, w_m=2.19, group_width=56),
    "regnety_16gf": RegNetConfig(depth=18, w_0=200, w_a=106.23, w_m=2.48, group_width=112),
    "regnety_32gf": RegNetConfig(depth=20, w_0=232, w_a=115.89, w_m=2.53, group_width=232),
    "regnety_64gf": RegNetConfig(depth=20, w_0=352, w_a=147.48, w_m=2.4, group_width=328),
    "regnety_128gf": RegNetConfig(depth=27, w_0=456, w_a=160.83, w_m=2.52, group_width=264),
    # SEER's 1.3B network: widths 746, 1492, 4103, 10444. The published text mixes two networks:
    # the widths it prints for 256 GF (528, 1056, 2904, 7392) are the 128 GF network's. Presets
    # of the same name elsewhere (5088 wide, 821M parameters) are a third one.
    "regnety_256gf": RegNetConfig(depth=27, w_0=640, w_a=230.83, w_m=2.53, group_width=373),
    "rg_10b": RegNetConfig(depth=27, w_0=1744, w_a=620.83, w_m=2.52, group_width=1010),
}


class Block(ResBottleneckBlock):  # type: ignore[misc]  # torchvision has no types
    """torchvision's residual block, which also takes one tensor per resolution at once.

    Whoever gathers or recomputes a block, or a layer of it, then does so once a pass and not once a
    resolution, and its gradient is complete as soon as the backward pass leaves it.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        squeeze = self.f.se
        self.f.se = Excitation(squeeze.fc1.in_channels, squeeze.fc1.out_channels)
        for layers in (self.f.a, self.f.c):  # a convolution, BatchNorm, and perhaps ReLU
            layers[0] = _as(PointwiseConv, layers[0])
        for layers in (self.f.b, *([self.proj] if self.proj is not None else [])):
            layers[0] = _as(Conv, layers[0])

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: list[Tensor]) -> list[Tensor]: ...
    def forward(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """[B, C, H, W] to [B, width, H / stride, W / stride], or a list of such to another."""
        several = x if isinstance(x, list) else [x]
        shortcuts = several if self.proj is None else layer_by_layer(self.proj, several)
        layers = (*self.f.a, *self.f.b, self.f.se, *self.f.c)
        # Added in place: no BatchNorm needs its own output in the backward pass.
        outputs = [
            self.activation(output.add_(shortcut))
            for output, shortcut in zip(layer_by_layer(layers, several), shortcuts, strict=True)
        ]
        return outputs if isinstance(x, list) else outputs[0]


def _as(kind: type[Conv], layer: nn.Conv2d) -> Conv:
    """A convolution of this kind, of a layer's size."""
    return kind(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]  # a pair of numbers, which torch's type lacks
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        groups=layer.groups,
        bias=layer.bias is not None,
    )


class RegNet(nn.Module):
    """A RegNetY without classifier: images [B, 3, H, W] to globally pooled features [B, width].

    Parameter names are those of `torchvision.models.RegNet`, so that its weights load.
    """

    def __init__(self, config: RegNetConfig) -> None:
        super().__init__()
        self.stem = SimpleStemIN(3, config.stem_width, nn.BatchNorm2d, nn.ReLU)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        width = config.stem_width
        for index, stage in enumerate(config.stages, start=1):
            stages[f"block{index}"] = AnyStage(
                width_in=width,
                width_out=stage.width,
                stride=STRIDE,
                depth=stage.depth,
                block_constructor=Block,
                norm_layer=nn.BatchNorm2d,
                activation_layer=nn.ReLU,
                group_width=stage.group_width,
                bottleneck_multiplier=1.0,
                se_ratio=config.se_ratio,
                stage_index=index,
            )
            width = stage.width
        self.trunk_output = nn.Sequential(stages)
        self.avgpool: nn.Module = nn.AdaptiveAvgPool2d((1, 1))
        self.width = width
        self.paddings: dict[str, Padding] = {}  # of `align_channels`, by tensor name

    @overload
    def forward(self, images: Tensor) -> Tensor: ...
    @overload
    def forward(self, images: list[Tensor]) -> list[Tensor]: ...
    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Features [B, width] of images [B, 3, H, W], or of each of several resolutions.

        Several go through the trunk block by block; BatchNorm still sees one at a time, in order.
        """
        if isinstance(images, list):
            maps = self.trunk_output([self.stem(resolution) for resolution in images])
            return [self._pool(resolution) for resolution in maps]
        return self._pool(self.trunk_output(self.stem(images)))

    def _pool(self, features: Tensor) -> Tensor:
        return torch.flatten(self.avgpool(features), 1)

    def stages(self) -> list[nn.Sequential]:
        """The stages, each a sequence of residual blocks."""
        return [stage for stage in self.trunk_output if isinstance(stage, nn.Sequential)]

    def blocks(self) -> list[list[nn.Module]]:
        """The residual blocks of each stage: the units of sharding and activation checkpointing."""
        return [list(stage) for stage in self.stages()]


def trunk_config(name: str) -> RegNetConfig:
    """Returns the entry `name` of `TRUNKS`.

    Raises:
        ConfigError: for an unknown name; the sentence has the nearest name.
    """
    if name in TRUNKS:
        return TRUNKS[name]
    hint = suggestion(name, TRUNKS, f"known trunks: {', '.join(TRUNKS)}")
    raise ConfigError(f"model.trunk={name!r} is not a known trunk; {hint}.")


def build_trunk(name: str, device: torch.device | str | None = None) -> RegNet:
    """Builds a trunk of `TRUNKS`, with the initial values of seed 0 unless on the meta device.

    Args:
        name: key of `TRUNKS`.
        device: where its tensors live; torch's default device unless given.

    Raises:
        ConfigError: if `name` is unknown.
    """
    config = trunk_config(name)
    # torch's own initial values would be drawn only to be overwritten; on meta they cost nothing.
    with torch.device("meta"):
        trunk = RegNet(config)
    target = torch.get_default_device() if device is None else torch.device(device)
    if target.type != "meta":
        trunk.to_empty(device=target)
        initialise(trunk, seed=0)
    return trunk
