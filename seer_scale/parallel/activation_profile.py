"""What the activations of a model take, block by block, measured on tensors without memory.

The model's own code runs forward and backward on fake tensors under the run's autocast, so copies
of weights that autocast makes and gradients of activations are in it. Not in it: parameters, their
gradients, and what a kernel takes for itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from seer_scale.models import MultiCropModel
from seer_scale.parallel.live_bytes import LiveBytes
from seer_scale.parallel.precision import AUTOCAST

# Of the loss, which is not the model's: tensors as large as the scores that SwAV has at once.
LOSS_COPIES = 7


@dataclass(frozen=True)
class Cost:
    """Bytes that a part of the model adds to those of the parts before it.

    Attributes:
        held: between its forward and its backward pass; its outputs are in it, its inputs not.
        peak: the most within either pass.
    """

    held: int
    peak: int


@dataclass(frozen=True)
class BlockProfile:
    """A block's cost if its activations are kept, and if they are recomputed."""

    kept: Cost
    recomputed: Cost


@dataclass(frozen=True)
class ActivationProfile:
    """Bytes of a micro-batch, in the order of the forward pass.

    Attributes:
        ends: crops, embeddings and scores, which the training loop holds all along.
        stem: never recomputed.
        blocks: of all stages.
        head: pooling, head, prototypes and the loss; never recomputed.
    """

    ends: int
    stem: Cost
    blocks: tuple[BlockProfile, ...]
    head: Cost

    def peak(self, recomputed: frozenset[int]) -> int:
        """Most bytes at once, if the blocks of these positions are recomputed.

        The backward pass reaches a block when those behind it are done and their memory is free,
        so only what is held before a block counts beside its own peak.
        """
        most, held = self.ends + self.stem.peak, self.ends + self.stem.held
        for index, block in enumerate(self.blocks):
            cost = block.recomputed if index in recomputed else block.kept
            most, held = max(most, held + cost.peak), held + cost.held
        return max(most, held + self.head.peak)


def profile_activations(
    build: Callable[[torch.device], MultiCropModel],
    crops: Sequence[tuple[int, int]],
    precision: str,
) -> ActivationProfile:
    """Profiles one micro-batch; takes seconds and next to no memory, for RG-10B too.

    Args:
        build: makes the model on the device it is given.
        crops: per resolution the images of a micro-batch and their size in pixels.
        precision: of `train.precision`.
    """
    with FakeTensorMode():
        model = build(torch.device("cpu")).train()
        images = [torch.empty(count, 3, size, size) for count, size in crops]
        stem, maps = _measure(model.trunk.stem, _each(model.trunk.stem), images, precision)
        known: dict[tuple[Any, ...], tuple[BlockProfile, list[Tensor]]] = {}
        blocks = []
        for block in itertools.chain(*model.blocks()):
            alike = (repr(block), *[tuple(x.shape) for x in maps])  # most of a stage's blocks are
            if alike not in known:
                known[alike] = _measure_block(block, maps, precision)
            profile, maps = known[alike]
            blocks.append(profile)
        head, outputs = _measure(model, _head(model), maps, precision)
    _, scores = outputs
    return ActivationProfile(
        ends=sum(x.nbytes for x in (*images, *outputs)),
        stem=stem,
        blocks=tuple(blocks),
        head=Cost(head.held, head.peak + LOSS_COPIES * scores.nbytes),
    )


def _each(layer: nn.Module) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda resolutions: [layer(x) for x in resolutions]


def _head(model: MultiCropModel) -> Callable[[list[Tensor]], list[Tensor]]:
    """What follows the blocks in the model's forward pass."""

    def run(maps: list[Tensor]) -> list[Tensor]:
        pooled = [torch.flatten(model.trunk.avgpool(x), 1) for x in maps]
        embeddings = model.head(torch.cat(pooled))
        return [embeddings, model.prototypes(embeddings)]

    return run


def _measure_block(
    block: nn.Module, maps: list[Tensor], precision: str
) -> tuple[BlockProfile, list[Tensor]]:
    def recompute(maps: list[Tensor]) -> Any:
        return checkpoint(block, maps, use_reentrant=False, preserve_rng_state=False)

    recomputed, _ = _measure(block, recompute, maps, precision)
    kept, outputs = _measure(block, block, maps, precision)
    return BlockProfile(kept, recomputed), outputs


def _measure(
    owner: nn.Module,
    run: Callable[[list[Tensor]], list[Tensor]],
    inputs: list[Tensor],
    precision: str,
) -> tuple[Cost, list[Tensor]]:
    """Costs of `run`, with parameters of `owner`; tensors like its outputs, for what follows."""
    owner.zero_grad()
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]  # without gradients
    with LiveBytes() as live:
        # fp32 and Apex, whose casts are not torch's: float32, which is the larger.
        half = AUTOCAST.get(precision)
        with torch.autocast("cpu", half, enabled=half is not None, cache_enabled=False):
            outputs = run(inputs)
        held, forward = live.now, live.peak()
        end = _End.apply(*outputs)
        following = [torch.empty_like(x).detach().requires_grad_() for x in outputs]
        del outputs
        end.backward()
    return Cost(held, max(forward, live.peak(without=[*_grads(owner), *following]))), following


def _grads(owner: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in owner.parameters()]


class _End(torch.autograd.Function):
    """Stands for the rest of the model: keeps nothing, and has a gradient for every tensor."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype) for x in tensors]
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(torch.empty(shape, dtype=dtype) for shape, dtype in ctx.like)
