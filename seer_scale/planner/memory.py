"""The bytes of a rank by kind, at the fullest moment of a step.

Weights, gradients and optimizer state come from `parallel/state_bytes.py` and are exact.
Activations come from `parallel/activation_profile.py`, which runs the model on tensors without
memory. `planner/moments.py` adds what else exists at each moment of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from seer_scale.parallel.activation_profile import ActivationProfile
from seer_scale.parallel.state_bytes import StateBytes, state_bytes
from seer_scale.performance.shape import FLOAT, Shape
from seer_scale.planner.job import Layout
from seer_scale.planner.moments import Moments

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by kind; their sum is the memory at the fullest moment of a step.

    Attributes:
        parameters: the rank's own weights, as the forward pass reads them.
        gradients: all gradients that the rank keeps.
        optimizer: momentum, and ZeRO's float32 copies of the weights.
        buffers: BatchNorm's running statistics.
        activations: activations and workspaces beyond the room of the gradients. Early in the
            backward pass activations are many and gradients few: activations use the room that
            gradients fill later, and only the excess counts.
        communication: buckets, and whole gradients that are about to be reduced.
        gathered: gathered weights beside the rank's own part of them.
    """

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    communication: float
    gathered: float

    @property
    def total(self) -> float:
        """Sum of all kinds in bytes."""
        return float(sum(asdict(self).values()))

    def gib(self) -> dict[str, float]:
        """GiB by kind, and their `total`."""
        kinds = {**asdict(self), "total": self.total}
        return {kind: number / GIB for kind, number in kinds.items()}


def memory_of(
    shape: Shape,
    profile: ActivationProfile,
    regions: Sequence[Sequence[int]],
    layout: Layout,
    *,
    gradient_accumulation: int,
    momentum_on_host: bool,
    fuse_backward: bool,
    on_touch: bool,
) -> Memory:
    """Computes the memory of a rank.

    Args:
        shape: parameters of the model.
        profile: activations of one micro-batch.
        regions: groups of blocks that are recomputed together.
        layout: ranks and sharding.
        gradient_accumulation: micro-batches of a step.
        momentum_on_host: value of `optim.momentum_on_host`.
        fuse_backward: value of `optim.fuse_backward`.
        on_touch: whether memory counts only once it is written to, as on a CPU.
    """
    state = _state(
        shape,
        layout,
        gradient_accumulation=gradient_accumulation,
        momentum_on_host=momentum_on_host,
        fuse_backward=fuse_backward,
    )
    fullest = Moments(shape, profile, regions, layout, state, on_touch).fullest()
    beyond = max(0.0, fullest.total - state.gradients)
    communication = min(fullest.communication, beyond)
    gathered = min(fullest.gathered, beyond - communication)
    return Memory(
        state.parameters,
        state.gradients,
        state.optimizer,
        shape.buffers,
        activations=beyond - communication - gathered,
        communication=communication,
        gathered=gathered,
    )


def _state(
    shape: Shape,
    layout: Layout,
    *,
    gradient_accumulation: int,
    momentum_on_host: bool,
    fuse_backward: bool,
) -> StateBytes:
    zero, shards = layout.zero, layout.shards
    state = state_bytes(
        shape.padded(layout.strategy, shards, stage=zero.stage),
        layout.strategy,
        shards,
        stage=zero.stage,
        persistent=zero.persistent,
    )
    if zero.stage == 1 and gradient_accumulation > 1:  # whole ones, up to the last micro-batch
        state = replace(state, gradients=float(FLOAT * shape.total))
    if momentum_on_host:
        state = replace(state, optimizer=FLOAT * max(shape.tensors) / shards)
    # One part's gradients at a time. Not under hsdp: FSDP2 keeps every unit's gradient, which its
    # all-reduce over the copies reads, until the backward pass has ended.
    if fuse_backward and layout.strategy != "hsdp":
        most = max(part.whole for part in shape.parts)
        state = replace(state, gradients=FLOAT * most / shards)
    return state
