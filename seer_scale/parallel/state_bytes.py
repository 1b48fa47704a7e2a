"""Formula for the bytes of weights, gradients and optimizer state that a strategy puts on a rank.

Everything is float32; the optimizer is SGD with momentum. The bytes are those of the moment when
all gradients are complete and the optimizer has not stepped: no unit is gathered, and no bucket is
being sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seer_scale.performance.shape import FLOAT


@dataclass(frozen=True)
class StateBytes:
    """Bytes per rank.

    Attributes:
        parameters: bytes of the parameters that the forward pass reads.
        gradients: bytes of the gradients.
        optimizer: bytes of the momentum, and of the masters if a strategy has separate ones.
    """

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Sum of the three parts."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    sizes: Sequence[int],
    strategy: str,
    shards: int,
    *,
    stage: int = 0,
    persistent: int = 0,
) -> StateBytes:
    """Computes the bytes on each rank, for tensors that divide evenly (without padding).

    ZeRO (arXiv 1910.02054, section 5) at stages 1 to 3 steps masters of its own and copies them
    into the parameters, so that float32 has every value twice.

    Args:
        sizes: number of elements of every tensor.
        strategy: ddp, fsdp, hsdp or zero; `fairscale` needs CUDA and has not been measured.
        shards: ranks that share one copy: all ranks, or `sharding.shard_size` ranks for hsdp.
        stage: ZeRO's stage, for strategy `zero`.
        persistent: `stage3_param_persistence_threshold`: at stage 3 a tensor with no more elements
            stays whole on every rank, beside the rank's slice of it.

    Raises:
        ValueError: for an unknown strategy or stage.
    """
    whole = float(FLOAT * sum(sizes))
    part = whole / shards
    # With one shard the slice is the whole tensor, which is not stored twice.
    small = FLOAT * sum(size for size in sizes if size <= persistent) if shards > 1 else 0
    if strategy == "ddp" or (strategy == "zero" and stage == 0):
        return StateBytes(whole, whole, whole)
    if strategy in ("fsdp", "hsdp"):
        return StateBytes(part, part, part)
    if strategy == "zero" and stage in (1, 2):  # stage 1 differs only before its reduction
        return StateBytes(whole, part, part + part)
    if strategy == "zero" and stage == 3:
        return StateBytes(part + small, part, part + part)
    raise ValueError(f"strategy {strategy!r} with stage {stage} is none of those known")
