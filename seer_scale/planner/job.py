"""The numbers of a run that decide its memory, traffic and time.

`planner/plan.py` reads them from the configuration. All other modules of the planner work with
these numbers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seer_scale.parallel.zero_limits import USES
from seer_scale.performance.shape import FLOAT

DOUBLE = 8  # bytes of a float64


@dataclass(frozen=True)
class Zero:
    """The part of DeepSpeed's `zero_optimization` that the planner uses.

    Attributes:
        stage: 0 to 3; 0 also for a run without DeepSpeed.
        bucket: elements that are reduced together (`reduce_bucket_size`).
        overlap: whether reductions run while the backward pass computes (`overlap_comm`).
        persistent: stage 3 keeps tensors of at most this many elements whole on every rank
            (`stage3_param_persistence_threshold`).
        prefetch: elements that stage 3 gathers ahead (`stage3_prefetch_bucket_size`).
        live: elements up to which stage 3 gathers ahead (`stage3_max_live_parameters`).
        reuse: stage 3 keeps a weight that is used again within this many elements
            (`stage3_max_reuse_distance`).
    """

    stage: int
    bucket: int
    overlap: bool
    persistent: int
    prefetch: int
    live: int
    reuse: int

    @property
    def kept(self) -> float:
        """Elements that stage 3 keeps gathered at most.

        The last layers of the forward pass are the first of the backward pass: see
        `parallel/zero_limits.py` for the elements of the reuse distance before the turn.
        """
        return max(self.live, self.reuse / USES)

    @classmethod
    def read(cls, section: Mapping[str, Any]) -> Zero:
        """Reads `zero_optimization`; an empty section stands for a run without DeepSpeed."""

        def number(key: str, default: int) -> int:
            value = section.get(key, "auto")  # DeepSpeed reads "auto" as left out
            return default if value == "auto" else int(value)

        return cls(
            stage=number("stage", 0),
            bucket=number("reduce_bucket_size", 500_000_000),
            overlap=bool(section.get("overlap_comm")),
            persistent=number("stage3_param_persistence_threshold", 0),
            prefetch=number("stage3_prefetch_bucket_size", 50_000_000),
            live=number("stage3_max_live_parameters", 1_000_000_000),
            reuse=number("stage3_max_reuse_distance", 1_000_000_000),
        )


@dataclass(frozen=True)
class Layout:
    """The ranks of a run and how they share the model.

    Attributes:
        strategy: value of `sharding.strategy`.
        nodes: number of machines.
        gpus_per_node: ranks on each machine.
        shards: ranks that share one copy of the model: 1 for `ddp`, `sharding.shard_size` for
            `hsdp`, all ranks otherwise.
        sync_bn_group_size: value of `sharding.sync_bn_group_size`.
        reshard_after_forward: value of `sharding.reshard_after_forward`.
        prefetch: value of `sharding.prefetch`.
        zero: DeepSpeed's settings.
        sent_low: bytes of a gathered parameter of a convolution or linear layer, as it is sent.
        held_low: the same in a rank's memory.
    """

    strategy: str
    nodes: int
    gpus_per_node: int
    shards: int
    sync_bn_group_size: int
    reshard_after_forward: bool
    prefetch: int
    zero: Zero
    sent_low: int = FLOAT
    held_low: int = FLOAT

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def name(self) -> str:
        """Name of the strategy in `planner.plan.STRATEGIES`, such as `zero3`."""
        return f"zero{self.zero.stage}" if self.strategy == "zero" else self.strategy

    @property
    def by_unit(self) -> bool:
        """Whether the strategy gathers and frees weights unit by unit, as FSDP does."""
        return self.strategy in ("fsdp", "hsdp")

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different parts of gradients or optimizer state."""
        return self.name not in ("ddp", "zero0")

    def group_ranks(self, size: int) -> int:
        """Ranks that share BatchNorm statistics for a value of `sharding.sync_bn_group_size`."""
        return {0: self.world, -1: self.gpus_per_node}.get(size, size)


@dataclass(frozen=True)
class Batch:
    """The images of one rank in one step, and the crops of an image.

    Attributes:
        micro_batch_size: images of a forward pass.
        gradient_accumulation: forward passes of a step.
        crop_sizes: side of the square crops in pixels, one entry per resolution.
        crop_counts: crops of an image, one entry per resolution.
        precision: value of `train.precision`.
        compiled: value of `train.compile`.
    """

    micro_batch_size: int
    gradient_accumulation: int
    crop_sizes: tuple[int, ...]
    crop_counts: tuple[int, ...]
    precision: str
    compiled: bool = False

    @property
    def images(self) -> int:
        """Images of one rank in one step."""
        return self.micro_batch_size * self.gradient_accumulation


@dataclass(frozen=True)
class Sinkhorn:
    """The iterations that turn SwAV's scores into codes (arXiv 2006.09882, section 3.1).

    Attributes:
        iterations: Sinkhorn-Knopp iterations per micro-batch.
        crops: crops of an image that get codes.
    """

    iterations: int
    crops: int
