"""A RegNetY whose modules stand as in VISSL's and ClassyVision's, written for the tests alone.

Its names come from the modules themselves, so that the converter's tables have something to be
compared with; and its features from the order in which those run: the shortcut first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seer_scale.models.regnet import RegNetConfig


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, reduced: int) -> None:
        super().__init__()
        self.excitation = nn.Sequential(
            nn.Conv2d(width, reduced, 1), nn.ReLU(), nn.Conv2d(reduced, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * self.excitation(x.mean((2, 3), keepdim=True))
        return scaled


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int, group_width: int) -> None:
        super().__init__()
        self.proj: nn.Conv2d | None
        if width_in != width or stride != 1:
            self.proj = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.bn = nn.BatchNorm2d(width)
        else:
            self.proj = None
        conv = nn.Conv2d(width, width, 3, stride, 1, groups=width // group_width, bias=False)
        self.f = nn.Sequential(
            OrderedDict(
                a=nn.Sequential(
                    nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
                ),
                b=nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()),
                se=SqueezeExcite(width, round(0.25 * width_in)),
                c=nn.Conv2d(width, width, 1, bias=False),
                final_bn=nn.BatchNorm2d(width),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.bn(self.proj(x))
        return torch.relu(shortcut + self.f(x))


class Stem(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        conv = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.stem(x)
        return features


class VisslRegNet(nn.Module):
    """`regnet`; with `groups` (block ends per stage) `regnet_fsdp`, as `stage_checkpoints`."""

    def __init__(self, config: RegNetConfig, groups: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__()
        features: OrderedDict[str, nn.Module] = OrderedDict(conv1=Stem(config.stem_width))
        width = config.stem_width
        for number, stage in enumerate(config.stages, start=1):
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for index in range(stage.depth):
                stride = 2 if index == 0 else 1
                block = Block(width, stage.width, stride, stage.group_width)
                blocks[f"block{number}-{index}"], width = block, stage.width
            if groups is not None:
                ends = sorted({*groups[number - 1], stage.depth})
                parts = zip([0, *ends], ends, strict=False)
                items = list(blocks.items())
                blocks = OrderedDict(
                    (f"block{number}-part{part}", nn.Sequential(OrderedDict(items[first:end])))
                    for part, (first, end) in enumerate(parts)
                )
            features[f"res{number + 1}"] = nn.Sequential(blocks)
        features["avgpool"] = nn.AdaptiveAvgPool2d((1, 1))
        features["flatten"] = nn.Flatten(1)
        self._feature_blocks = nn.Sequential(features)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self._feature_blocks(images)
        return features
