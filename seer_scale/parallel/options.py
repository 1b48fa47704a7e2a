"""The options of `engine.shard` that say how a model is distributed over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ShardingOptions:
    """Options to distribute, normalise and recompute one model; the defaults are plain `ddp`.

    Attributes:
        strategy: ddp, fsdp, hsdp, zero or fairscale.
        deepspeed_config: path of the DeepSpeed JSON of strategy `zero`, named in messages.
        shard_size: hsdp: ranks that share one copy of the model; None means the ranks of a node.
        reshard_after_forward: fsdp, hsdp, fairscale: free a unit's weights after its forward pass
            and gather them again for the backward pass.
        prefetch: fsdp, hsdp: units gathered ahead of their use.
        unit_parameters: fsdp, hsdp, fairscale: a layer with more parameters is a unit of its own.
        activation_checkpointing: none, full, groups or auto:GIB.
        checkpoint_groups: for groups: per stage the ends of its groups of blocks.
        syncbn: native (`GroupedSyncBatchNorm`) or apex.
        sync_bn_group_size: ranks that share BatchNorm statistics: 0 all, -1 a node, n groups of n.
        align_channels: pad the trunk's channel groups to a multiple of this.
        compile: compile every block with torch.compile.
        gradient_accumulation: micro-batches per optimizer step.
    """

    strategy: str = "ddp"
    deepspeed_config: str | None = None
    shard_size: int | None = None
    reshard_after_forward: bool = True
    prefetch: int = 1
    unit_parameters: int = 200_000_000
    activation_checkpointing: str = "none"
    checkpoint_groups: Sequence[Sequence[int]] | None = None
    syncbn: str = "native"
    sync_bn_group_size: int = 0
    align_channels: int = 1
    compile: bool = False
    gradient_accumulation: int = 1
