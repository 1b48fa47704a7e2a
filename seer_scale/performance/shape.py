"""A model in the numbers that memory and communication depend on; built on the meta device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from seer_scale.config.run_config import ModelSection
from seer_scale.models import MultiCropModel, build_model


@dataclass(frozen=True)
class Part:
    """A block, the head with its prototypes, or the stem: neighbours in the passes.

    Attributes:
        whole: parameters.
        units: of them those that a sharding strategy gathers together, one number per unit.
        largest_tensor: parameters of the largest one.
        largest_layer: parameters of the module that has most itself.
    """

    whole: int
    units: tuple[int, ...]
    largest_tensor: int
    largest_layer: int


@dataclass(frozen=True)
class Shape:
    """Parameters and buffers of a model.

    Attributes:
        trunk: parameters.
        head: parameters of the projection head.
        prototypes: parameters.
        tensor_shapes: of every parameter.
        buffers: bytes; every rank holds all.
        norms: channels of every BatchNorm of the trunk, and of the head.
        stem: what runs before the blocks.
        blocks: in the order of the forward pass.
        top: what runs after them.
        depths: blocks of every stage.
    """

    trunk: int
    head: int
    prototypes: int
    tensor_shapes: tuple[tuple[int, ...], ...]
    buffers: int
    norms: tuple[tuple[int, ...], tuple[int, ...]]
    stem: Part
    blocks: tuple[Part, ...]
    top: Part
    depths: tuple[int, ...]

    @property
    def total(self) -> int:
        """Parameters."""
        return self.trunk + self.head + self.prototypes

    @cached_property
    def tensors(self) -> tuple[int, ...]:
        """Parameters of every tensor."""
        return tuple(math.prod(shape) for shape in self.tensor_shapes)

    def padded(self, strategy: str, shards: int, *, stage: int = 0) -> list[int]:
        """Elements of every tensor, filled up until `shards` ranks hold equal parts.

        FSDP2 deals out whole rows, and rank 0 has as many as any; ZeRO deals out elements, at
        stages 1 and 2 in pairs.

        Args:
            strategy: of `sharding.strategy`.
            shards: ranks that share one copy.
            stage: of ZeRO, for strategy `zero`.
        """
        if strategy in ("fsdp", "hsdp"):
            rows = ((shape[0], math.prod(shape[1:])) for shape in self.tensor_shapes)
            return [_up(first, shards) * row for first, row in rows]
        if strategy == "zero" and stage > 0:
            return [_up(size, shards * (1 if stage == 3 else 2)) for size in self.tensors]
        return list(self.tensors)


def regions(
    mode: str,
    depths: Sequence[int],
    groups: Sequence[Sequence[int]] | None = None,
    chosen: frozenset[int] = frozenset(),
) -> tuple[tuple[int, ...], ...]:
    """Blocks that are recomputed together, by position in the trunk.

    Args:
        mode: of `sharding.activation_checkpointing`.
        depths: blocks of every stage.
        groups: `sharding.checkpoint_groups`, for mode `groups`.
        chosen: the blocks of mode `auto`.
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


@cache
def shape_of(model: ModelSection, heavy: int) -> Shape:
    """The numbers of a configured model.

    Args:
        model: the recipe's section.
        heavy: `sharding.unit_parameters`: larger layers are units of their own.
    """
    built = build_model(
        model.trunk,
        head_dims=model.head_dims,
        head_batch_norm=model.head_batch_norm,
        prototypes=model.prototypes,
        device="meta",
    )
    return read_shape(built, heavy)


def read_shape(model: MultiCropModel, heavy: int) -> Shape:
    """As `shape_of`, of a model that is there."""
    blocks = [block for stage in model.blocks() for block in stage]
    return Shape(
        trunk=_count(model.trunk),
        head=_count(model.head),
        prototypes=_count(model.prototypes),
        tensor_shapes=tuple(tuple(parameter.shape) for parameter in model.parameters()),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        norms=(_channels(model.trunk), _channels(model.head)),
        stem=_part([model.trunk.stem], heavy),
        blocks=tuple(_part([block], heavy) for block in blocks),
        top=_part([model.head, model.prototypes], heavy),
        depths=tuple(len(stage) for stage in model.blocks()),
    )


def _part(modules: Sequence[nn.Module], heavy: int) -> Part:
    units: list[int] = []
    own: list[int] = []
    for module in modules:
        layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in module.modules()]
        own += layers
        # As `MultiCropModel.units` has it: heavy layers inside, then what is left.
        alone = [layer for layer in layers[1:] if layer > heavy]
        units += [*alone, sum(layers) - sum(alone)]
    tensors = [p.numel() for module in modules for p in module.parameters()]
    return Part(sum(tensors), tuple(units), max(tensors), max(own))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _channels(module: nn.Module) -> tuple[int, ...]:
    return tuple(m.num_features for m in module.modules() if isinstance(m, _BatchNorm))
