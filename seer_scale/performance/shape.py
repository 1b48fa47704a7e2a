"""The shape of a model: the numbers that memory and communication depend on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from seer_scale.models import MultiCropModel

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Part:
    """Parameters of the stem, of a block, or of the head with its prototypes.

    Attributes:
        whole: number of parameters.
        units: parameters of each unit that a sharding strategy gathers together.
        low: parameters per unit of convolutions and linear layers that may run in 16 bit.
        largest_tensor: parameters of the largest tensor.
        largest_layer: parameters of the largest layer, without its sublayers.
    """

    whole: int
    units: tuple[int, ...]
    low: tuple[int, ...]
    largest_tensor: int
    largest_layer: int

    def unit_bytes(self, low: int) -> tuple[int, ...]:
        """Bytes of each unit, gathered.

        Args:
            low: bytes of a parameter that may run in 16 bit.
        """
        pairs = zip(self.units, self.low, strict=True)
        return tuple(FLOAT * (unit - part) + low * part for unit, part in pairs)


@dataclass(frozen=True)
class Shape:
    """Parameters and buffers of a model.

    Attributes:
        trunk: parameters of the trunk.
        head: parameters of the projection head.
        prototypes: parameters of the prototypes.
        tensor_shapes: shape of every parameter tensor.
        low_tensors: whether each of them belongs to a layer that may run in 16 bit.
        buffers: bytes of all buffers; every rank holds all of them.
        norms: channels of every BatchNorm, of the trunk and of the head.
        stem: the layers before the blocks.
        blocks: the blocks in the order of the forward pass.
        top: the projection head with the prototypes.
        depths: number of blocks of every stage.
    """

    trunk: int
    head: int
    prototypes: int
    tensor_shapes: tuple[tuple[int, ...], ...]
    low_tensors: tuple[bool, ...]
    buffers: int
    norms: tuple[tuple[int, ...], tuple[int, ...]]
    stem: Part
    blocks: tuple[Part, ...]
    top: Part
    depths: tuple[int, ...]

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.trunk + self.head + self.prototypes

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts in the order of the forward pass."""
        return (self.stem, *self.blocks, self.top)

    @cached_property
    def tensors(self) -> tuple[int, ...]:
        """Number of elements of every parameter tensor."""
        return tuple(math.prod(shape) for shape in self.tensor_shapes)

    def padded(self, strategy: str, shards: int, *, stage: int = 0) -> list[int]:
        """Elements of every tensor, padded until `shards` ranks hold equal parts.

        FSDP2 shards whole rows. ZeRO shards elements; at stages 1 and 2 in pairs, and all tensors
        as one.

        Args:
            strategy: value of `sharding.strategy`.
            shards: ranks that share one copy of the model.
            stage: ZeRO's stage, for strategy `zero`.
        """
        if strategy in ("fsdp", "hsdp"):
            rows = ((shape[0], math.prod(shape[1:])) for shape in self.tensor_shapes)
            return [_up(first, shards) * row for first, row in rows]
        if strategy == "zero" and stage == 3:
            return [_up(size, shards) for size in self.tensors]
        if strategy == "zero" and stage > 0:
            return [_up(self.total, 2 * shards)]
        return list(self.tensors)


def regions(
    mode: str,
    depths: Sequence[int],
    groups: Sequence[Sequence[int]] | None = None,
    chosen: frozenset[int] = frozenset(),
) -> tuple[tuple[int, ...], ...]:
    """Lists the groups of blocks that are recomputed together, by position in the trunk.

    Args:
        mode: value of `sharding.activation_checkpointing`.
        depths: number of blocks of every stage.
        groups: value of `sharding.checkpoint_groups`, for mode `groups`.
        chosen: recomputed blocks, for mode `auto:GIB`.
    """
    count = sum(depths)
    if mode == "full":
        return tuple((block,) for block in range(count))
    if mode.startswith("auto"):
        return tuple((block,) for block in sorted(chosen))
    found: list[tuple[int, ...]] = []
    first = 0
    for depth, ends in zip(depths, groups or [()] * len(depths), strict=True):
        if ends:
            bounds = [0, *sorted({min(end, depth) for end in ends} | {depth})]
            found += [
                tuple(range(first + a, first + b)) for a, b in itertools.pairwise(bounds) if b > a
            ]
        first += depth
    return tuple(found)


def read_shape(model: MultiCropModel, heavy: int) -> Shape:
    """Reads the shape of a model; the meta device is enough.

    Args:
        model: the model.
        heavy: value of `sharding.unit_parameters`; larger layers are units of their own.
    """
    blocks = [block for stage in model.blocks() for block in stage]
    low = frozenset(model.low_precision_layers())
    in_low = {tensor for layer in low for tensor in layer.parameters(recurse=False)}
    return Shape(
        trunk=_count(model.trunk),
        head=_count(model.head),
        prototypes=_count(model.prototypes),
        tensor_shapes=tuple(tuple(parameter.shape) for parameter in model.parameters()),
        low_tensors=tuple(parameter in in_low for parameter in model.parameters()),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        norms=(_channels(model.trunk), _channels(model.head)),
        stem=_part([model.trunk.stem], heavy, low),
        blocks=tuple(_part([block], heavy, low) for block in blocks),
        top=_part([model.head, model.prototypes], heavy, low),
        depths=tuple(len(stage) for stage in model.blocks()),
    )


def _part(modules: Sequence[nn.Module], heavy: int, low: Collection[nn.Module]) -> Part:
    units: list[int] = []
    of_low: list[int] = []
    own: list[int] = []
    for module in modules:
        layers = list(module.modules())
        sizes = [sum(p.numel() for p in layer.parameters(recurse=False)) for layer in layers]
        own += sizes
        # The same units as in `MultiCropModel.units`: heavy layers, then all the rest.
        alone = [index for index, size in enumerate(sizes) if index and size > heavy]
        rest = [index for index in range(len(sizes)) if index not in alone]
        for unit in (*([index] for index in alone), rest):
            units.append(sum(sizes[index] for index in unit))
            of_low.append(sum(sizes[index] for index in unit if layers[index] in low))
    tensors = [p.numel() for module in modules for p in module.parameters()]
    return Part(sum(tensors), tuple(units), tuple(of_low), max(tensors), max(own))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _channels(module: nn.Module) -> tuple[int, ...]:
    return tuple(m.num_features for m in module.modules() if isinstance(m, _BatchNorm))
