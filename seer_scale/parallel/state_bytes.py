"""How many bytes of weights, gradients and optimizer state a strategy leaves on a rank.

Float32 throughout, SGD with momentum. At the moment when gradients are complete and the optimizer
has not stepped yet: no unit is gathered, no bucket is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FLOAT = 4


@dataclass(frozen=True)
class StateBytes:
    """Bytes per rank.

    Attributes:
        parameters: what the forward pass reads.
        gradients: of the step that is about to be made.
        optimizer: momentum, and the masters where a strategy keeps them beside the parameters.
    """

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    sizes: Sequence[int],
    strategy: str,
    shards: int,
    *,
    stage: int = 0,
    persistent: int = 0,
) -> StateBytes:
    """What each rank holds if tensors divide evenly: bytes, not the few that pad a slice.

    ZeRO (arXiv 1910.02054, section 5) at stages 1 to 3 steps masters of its own and copies them
    into the parameters, so that in float32 there are two of each value.

    Args:
        sizes: elements of every tensor.
        strategy: of `sharding.strategy`; `fairscale` needs CUDA and has not been measured.
        shards: ranks that share one copy: all, under `hsdp` those of `sharding.shard_size`.
        stage: of ZeRO, for strategy `zero`.
        persistent: `stage3_param_persistence_threshold`: at stage 3 tensors of no more elements
            stay whole on every rank, beside its slice of them.

    Raises:
        ValueError: for an unknown strategy or stage.
    """
    whole = float(FLOAT * sum(sizes))
    part = whole / shards
    # A slice that is the whole tensor is not there twice.
    small = FLOAT * sum(size for size in sizes if size <= persistent) if shards > 1 else 0
    if strategy == "ddp" or (strategy == "zero" and stage == 0):
        return StateBytes(whole, whole, whole)
    if strategy in ("fsdp", "hsdp"):
        return StateBytes(part, part, part)
    if strategy == "zero" and stage == 1:
        return StateBytes(whole, whole, part + part)
    if strategy == "zero" and stage == 2:
        return StateBytes(whole, part, part + part)
    if strategy == "zero" and stage == 3:
        return StateBytes(part + small, part, part + part)
    raise ValueError(f"strategy {strategy!r} with stage {stage} is none of those known")
