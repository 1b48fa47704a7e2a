"""Counts the floating-point operations of a RegNet and its head, layer by layer.

A multiplication and an addition count as two. Only convolutions and linear layers count. The
backward pass computes one product for the gradient of the weight and one for the gradient of the
input; each has as many operations as the forward pass. torch's `FlopCounterMode` counts the same,
except that it counts the gradient of a grouped convolution's weight once per group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seer_scale.models import RegNetConfig
from seer_scale.models.regnet import STRIDE

STEM = -1


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer at one crop size, per image.

    Attributes:
        block: position of the block in the trunk; `STEM` for the stem.
        forward: operations of the forward pass.
        outputs: elements of the output.
        groups: groups of the convolution.
        normalised: whether BatchNorm follows.
        input_gradient: whether the backward pass needs the gradient of the input; False for the
            stem, whose input is an image.
    """

    block: int
    forward: int
    outputs: int
    groups: int = 1
    normalised: bool = True
    input_gradient: bool = True

    @property
    def training(self) -> int:
        """Operations of the forward and the backward pass."""
        return self.forward * (3 if self.input_gradient else 2)


def trunk_layers(config: RegNetConfig, size: int) -> list[Layer]:
    """Lists the layers of a trunk for a crop (RegNetY, arXiv 2003.13678, section 3).

    Args:
        config: configuration of the trunk.
        size: side of the square crop in pixels.
    """
    size = _halved(size)
    layers = [
        Layer(
            STEM,
            forward=2 * 9 * 3 * config.stem_width * size**2,
            outputs=config.stem_width * size**2,
            input_gradient=False,
        )
    ]
    width_in, block = config.stem_width, 0
    for stage in config.stages:
        for index in range(stage.depth):
            stride = STRIDE if index == 0 else 1
            layers += _block(block, width_in, stage.width, stage.groups, stride, size, config)
            size = _halved(size) if stride == STRIDE else size
            width_in, block = stage.width, block + 1
    return layers


def _block(
    block: int,
    width_in: int,
    width: int,
    groups: int,
    stride: int,
    size: int,
    config: RegNetConfig,
) -> list[Layer]:
    before = size**2
    after = _halved(size) ** 2 if stride == STRIDE else before
    squeezed = round(config.se_ratio * width_in)
    layers = [
        Layer(block, 2 * width_in * width * before, width * before),
        Layer(block, 2 * 9 * width * (width // groups) * after, width * after, groups=groups),
        Layer(block, 2 * width * squeezed, squeezed, normalised=False),
        Layer(block, 2 * squeezed * width, width, normalised=False),
        Layer(block, 2 * width * width * after, width * after),
    ]
    if stride != 1 or width_in != width:
        layers.insert(0, Layer(block, 2 * width_in * width * after, width * after))
    return layers


def _halved(size: int) -> int:
    return (size + 1) // 2


@dataclass(frozen=True)
class Flops:
    """Operations per image of a training step, all crops together.

    Attributes:
        by_size: crop size in pixels -> operations of one crop's forward pass through the trunk.
        forward: forward pass of all crops through trunk, head and prototypes.
        training: forward and backward pass, without recomputation.
        recompute: operations that activation checkpointing adds.
        torch_counter: the count of `FlopCounterMode` for `training`.
    """

    by_size: dict[int, int]
    forward: int
    training: int
    recompute: int
    torch_counter: int


def count_flops(
    config: RegNetConfig,
    *,
    crop_sizes: Sequence[int],
    crop_counts: Sequence[int],
    head_dims: Sequence[int],
    prototypes: int,
    recomputed: Iterable[int] = (),
) -> Flops:
    """Counts the operations of an image's crops through trunk, head and prototypes.

    Args:
        config: configuration of the trunk.
        crop_sizes: side of the square crops in pixels, one entry per resolution.
        crop_counts: crops of an image, one entry per resolution.
        head_dims: widths of the projection head.
        prototypes: number of prototypes.
        recomputed: positions of the blocks whose forward pass runs twice.
    """
    twice = frozenset(recomputed)
    by_size: dict[int, int] = {}
    forward = training = recompute = surplus = 0
    for size, count in zip(crop_sizes, crop_counts, strict=True):
        layers = trunk_layers(config, size)
        by_size[size] = sum(layer.forward for layer in layers)
        forward += count * by_size[size]
        training += count * sum(layer.training for layer in layers)
        recompute += count * sum(layer.forward for layer in layers if layer.block in twice)
        surplus += count * sum((layer.groups - 1) * layer.forward for layer in layers)
    widths = [config.stages[-1].width, *head_dims, prototypes]
    head = 2 * sum(a * b for a, b in itertools.pairwise(widths)) * sum(crop_counts)
    return Flops(
        by_size,
        forward + head,
        training + 3 * head,
        recompute,
        training + 3 * head + surplus,
    )
