"""Memory of a model's activations, block by block, measured on tensors without memory.

The model's own code runs forward and backward on fake tensors under the run's autocast. The profile
therefore counts the copies that autocast makes of float32 weights, and gradients of activations. It
does not count parameters, their gradients, and the workspace of a kernel.
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

# The loss is not part of the model: SwAV holds so many tensors of the scores' size at once.
LOSS_COPIES = 7


@dataclass(frozen=True)
class Cost:
    """Bytes that a part of the model adds to those of the parts before it.

    Attributes:
        held: bytes between the part's forward and backward pass, with its outputs and without its
            inputs.
        peak: largest number of bytes within either pass.
    """

    held: int
    peak: int


@dataclass(frozen=True)
class BlockProfile:
    """Costs of a block whose activations are kept, and of the same block recomputed."""

    kept: Cost
    recomputed: Cost


@dataclass(frozen=True)
class ActivationProfile:
    """Bytes of a micro-batch, in the order of the forward pass.

    Attributes:
        ends: bytes of crops, embeddings and scores, which the training loop holds all the time.
        stem: cost of the stem, which is never recomputed.
        blocks: costs of the blocks of all stages.
        head: cost of pooling, head, prototypes and the loss, which are never recomputed.
    """

    ends: int
    stem: Cost
    blocks: tuple[BlockProfile, ...]
    head: Cost

    def peak(self, recomputed: frozenset[int]) -> int:
        """Computes the largest number of bytes at once if the blocks `recomputed` are recomputed.

        The backward pass reaches a block when the blocks after it are done and their memory is
        free. So only the bytes held before a block count beside the block's own peak.
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
    weights: torch.dtype | None = None,
) -> ActivationProfile:
    """Profiles one micro-batch, in seconds and with almost no memory, even for RG-10B.

    Args:
        build: makes the model on the given device.
        crops: number of images of a micro-batch and their size in pixels, per resolution.
        precision: fp32, bf16, amp-o1 or apex-o1.
        weights: type of the weights that the forward pass would cast (`precision.held_as`); None
            for float32, of which autocast makes a copy at every use.
    """
    with FakeTensorMode():
        model = build(torch.device("cpu")).train()
        if weights is not None:
            _cast_weights(model, weights)
        images = [torch.empty(count, 3, size, size) for count, size in crops]
        stem, maps = _measure(model.trunk.stem, _each(model.trunk.stem), images, precision)
        known: dict[tuple[Any, ...], tuple[BlockProfile, list[Tensor]]] = {}
        blocks = []
        for block in itertools.chain(*model.blocks()):
            alike = (repr(block), *[tuple(x.shape) for x in maps])  # as most blocks of a stage
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


def _cast_weights(model: MultiCropModel, weights: torch.dtype) -> None:
    for layer in model.low_precision_layers():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            low = nn.Parameter(parameter.detach().to(weights))
            low.grad_dtype = torch.float32
            setattr(layer, name, low)


def _each(layer: nn.Module) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda resolutions: [layer(x) for x in resolutions]


def _head(model: MultiCropModel) -> Callable[[list[Tensor]], list[Tensor]]:
    """The part of the model's forward pass that follows the blocks."""

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
    """Measures `run`, which uses the parameters of `owner`; returns tensors like its outputs."""
    owner.zero_grad()
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]  # without gradients
    with LiveBytes() as live:
        # fp32; also Apex, whose casts are not torch's: float32 is the upper bound.
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
    """Stands in for the rest of the model: keeps nothing, returns a gradient for every tensor."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype) for x in tensors]
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(torch.empty(shape, dtype=dtype) for shape, dtype in ctx.like)
