"""What the ranks of a step say to each other: messages by kind, their bytes, their time.

Ring collectives: of S bytes over n ranks an all-reduce sends 2 S (n - 1) / n per rank, an
all-gather or reduce-scatter half of that. A ring crosses each node's boundary once; all links of a
node carry it together, as NCCL's several rings do. Latency adds up along a ring; for an all-reduce
NCCL has trees too, whose latency grows with the logarithm of the nodes, and takes the better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from seer_scale.config import RunConfig
from seer_scale.parallel.state_bytes import FLOAT
from seer_scale.performance.hardware import Hardware
from seer_scale.performance.shape import Shape

DOUBLE = 8
MICRO = 1e-6
Op = Literal["all_reduce", "all_gather", "reduce_scatter"]
# When: while the forward or the backward pass computes, or with everybody waiting.
When = Literal["forward", "backward", "waiting"]


@dataclass(frozen=True)
class Ranks:
    """Who takes part in a collective.

    Attributes:
        size: ranks.
        nodes: machines they are on.
    """

    size: int
    nodes: int


@dataclass(frozen=True)
class Message:
    """Collectives of one kind, `count` times a step.

    Attributes:
        kind: sharding, gradients, sync_batch_norm, sinkhorn or optimizer.
        op: the collective.
        size: bytes of the whole tensor.
        count: how often.
        ranks: between whom.
        when: what it can hide behind.
    """

    kind: str
    op: Op
    size: float
    count: float
    ranks: Ranks
    when: When

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a step."""
        n = self.ranks.size
        return self.count * self.size * (n - 1) / n * (2 if self.op == "all_reduce" else 1)

    def seconds(self, hardware: Hardware) -> float:
        """All of them, one after the other."""
        n, nodes = self.ranks.size, self.ranks.nodes
        if n == 1:
            return 0.0
        intra = hardware.intra_node_gb_s.bytes_per_second
        inter = hardware.inter_node_gb_s.bytes_per_second
        rate = intra if nodes == 1 else min(intra, inter * max(1.0, n / nodes))
        latency = hardware.latency_us
        rounds = 2 if self.op == "all_reduce" else 1
        ring = rounds * ((n - nodes) * latency.intra + (nodes if nodes > 1 else 0) * latency.inter)
        if self.op == "all_reduce":
            per_node = math.ceil(n / nodes)
            tree = 2 * ((per_node - 1) * latency.intra + math.log2(nodes) * latency.inter)
            ring = min(ring, tree)
        return self.count * ring * MICRO + self.sent / rate


def messages(
    shape: Shape,
    config: RunConfig,
    *,
    nodes: int,
    gpus_per_node: int,
    zero: Mapping[str, Any],
) -> list[Message]:
    """Of a step.

    Args:
        shape: of the model.
        config: of the run.
        nodes: machines.
        gpus_per_node: ranks of each.
        zero: DeepSpeed's `zero_optimization`, for strategy `zero`.
    """
    world = Ranks(nodes * gpus_per_node, nodes)
    found = [
        *_weights(shape, config, world, gpus_per_node, zero),
        *_batch_norm(shape, config, world, gpus_per_node),
        *_objective(config, world),
        *_norms(shape, config, world, gpus_per_node, zero),
    ]
    return [message for message in found if message.ranks.size > 1 and message.size]


def _weights(
    shape: Shape, config: RunConfig, world: Ranks, per_node: int, zero: Mapping[str, Any]
) -> list[Message]:
    """Weights that are gathered and gradients that are reduced; both are float32."""
    whole, strategy = float(FLOAT * shape.total), config.sharding.strategy
    micro_batches = config.train.gradient_accumulation
    if strategy == "ddp":
        buckets = math.ceil(whole / (25 * 2**20))  # DDP's default
        return [_split("gradients", "all_reduce", whole, buckets, world, "backward")]
    if strategy in ("fsdp", "hsdp"):
        inner, outer = world, None
        if strategy == "hsdp":
            size = config.sharding.shard_size or per_node
            inner = group_of(size, per_node)
            outer = Ranks(world.size // size, math.ceil(world.nodes / inner.nodes))
        units = sum(len(part.units) for part in (shape.stem, *shape.blocks, shape.top))
        found = [
            _split("sharding", "all_gather", whole, units, inner, "forward", micro_batches),
            _split("gradients", "reduce_scatter", whole, units, inner, "backward", micro_batches),
        ]
        if config.sharding.reshard_after_forward:
            found.append(
                _split("sharding", "all_gather", whole, units, inner, "backward", micro_batches)
            )
        if outer:
            part = whole / inner.size
            found.append(
                _split("gradients", "all_reduce", part, units, outer, "backward", micro_batches)
            )
        return found
    return _zero_weights(shape, whole, world, micro_batches, zero)


def _zero_weights(
    shape: Shape, whole: float, world: Ranks, micro_batches: int, zero: Mapping[str, Any]
) -> list[Message]:
    stage = int(zero.get("stage", 0))
    bucket = FLOAT * int(zero.get("reduce_bucket_size", 500_000_000))
    buckets = math.ceil(whole / bucket)
    hidden: When = "backward" if zero.get("overlap_comm") else "waiting"
    if stage == 0:
        return [_split("gradients", "all_reduce", whole, buckets, world, "waiting")]
    if stage < 3:
        times = micro_batches if stage == 2 else 1
        # DeepSpeed all-reduces a bucket that is several ranks' (use_multi_rank_bucket_allreduce).
        return [
            _split("gradients", "all_reduce", whole, buckets, world, hidden, times),
            # What the optimizer has stepped, group by group, and a group is a tensor.
            _split("sharding", "all_gather", whole, len(shape.tensors), world, "waiting"),
        ]
    small = int(zero.get("stage3_param_persistence_threshold", 0))
    shared = float(FLOAT * sum(size for size in shape.tensors if size > small))
    fetches = max(1, sum(size > small for size in shape.tensors))
    found = [
        _split("gradients", "reduce_scatter", whole, buckets, world, hidden, micro_batches),
        _split("sharding", "all_gather", shared, fetches, world, "forward", micro_batches),
        _split("sharding", "all_gather", whole - shared, 1, world, "waiting"),
    ]
    if shared > FLOAT * int(zero.get("stage3_max_live_parameters", 1_000_000_000)):
        found.append(
            _split("sharding", "all_gather", shared, fetches, world, "backward", micro_batches)
        )
    return found


def _split(
    kind: str, op: Op, size: float, pieces: int, ranks: Ranks, when: When, times: int = 1
) -> Message:
    return Message(kind, op, size / pieces, pieces * times, ranks, when)


def _batch_norm(shape: Shape, config: RunConfig, world: Ranks, per_node: int) -> list[Message]:
    """Mean, variance and count forward in float64, two sums backward in float32, per resolution."""
    size = config.sharding.sync_bn_group_size
    ranks = group_of({0: world.size, -1: per_node}.get(size, size), per_node)
    in_trunk, in_head = shape.norms
    times = config.train.gradient_accumulation
    resolutions = len(config.data.crop_sizes)
    found = []
    for channels, each in ((in_trunk, resolutions), (in_head, 1)):
        for count in channels:
            found += [
                Message("sync_batch_norm", "all_reduce", DOUBLE * (2 * count + 1), times * each,
                        ranks, "waiting"),
                Message("sync_batch_norm", "all_reduce", FLOAT * 2 * count, times * each,
                        ranks, "waiting"),
            ]  # fmt: skip
    return found


def _objective(config: RunConfig, world: Ranks) -> list[Message]:
    """Row sums of the prototypes: one per iteration and a maximum, for both crops with codes."""
    options = config.objective.options
    if config.objective.name != "swav":
        return []
    iterations = int(options.get("sinkhorn_iterations", 3))
    assigned = len(options.get("assign_crops", (0, 1)))
    count = config.train.gradient_accumulation * (iterations + 1)
    size = FLOAT * config.model.prototypes * assigned  # the crops' vectors travel together
    return [Message("sinkhorn", "all_reduce", size, count, world, "waiting")]


def _norms(
    shape: Shape, config: RunConfig, world: Ranks, per_node: int, zero: Mapping[str, Any]
) -> list[Message]:
    """LARC's squared norms of all tensors, and of the prototypes' rows; float64, if sharded."""
    strategy = config.sharding.strategy
    if strategy == "ddp" or (strategy == "zero" and int(zero.get("stage", 0)) == 0):
        return []
    ranks = world
    if strategy == "hsdp":
        ranks = group_of(config.sharding.shard_size or per_node, per_node)
    return [
        Message("optimizer", "all_reduce", DOUBLE * 2 * len(shape.tensors), 1, ranks, "waiting"),
        Message("optimizer", "all_reduce", DOUBLE * config.model.prototypes, 1, ranks, "waiting"),
    ]


def group_of(size: int, per_node: int) -> Ranks:
    """A group of consecutive ranks; others like it work beside it."""
    return Ranks(size, math.ceil(size / per_node))


def bytes_by_kind(found: Sequence[Message]) -> dict[str, float]:
    """Bytes that a rank sends in a step, by kind."""
    kinds = ("sharding", "gradients", "sync_batch_norm", "sinkhorn", "optimizer")
    return {kind: sum(m.sent for m in found if m.kind == kind) for kind in kinds}
