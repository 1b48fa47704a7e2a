"""The messages that the ranks exchange in a step: bytes by kind, and seconds.

A ring all-reduce of S bytes over n ranks sends 2 S (n - 1) / n bytes per rank; an all-gather or a
reduce-scatter sends half of that (Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002). A ring
crosses the boundary of each node once, and all links of a node carry it together, as NCCL's
parallel rings do. A ring's latency grows with the number of ranks. For all-reduces NCCL also has
trees (Sanders, Speck and Traeff 2009, doi 10.1016/j.parco.2009.09.001), whose latency grows with
the logarithm of the number of nodes. The faster of the two counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from seer_scale.optim.groups import MOST_JOINED
from seer_scale.parallel.batchnorm_gpu import MOST_GATHERED
from seer_scale.parallel.zero_limits import USES
from seer_scale.performance.hardware import Hardware
from seer_scale.performance.shape import FLOAT, Shape
from seer_scale.planner.job import DOUBLE, Batch, Layout, Sinkhorn, Zero

MICRO = 1e-6
DDP_BUCKET = 25 * 2**20  # bytes; torch's default
Op = Literal["all_reduce", "all_gather", "reduce_scatter"]
# During the forward or the backward pass, or while all ranks wait.
When = Literal["forward", "backward", "waiting"]


@dataclass(frozen=True)
class Ranks:
    """The ranks that take part in a collective.

    Attributes:
        size: number of ranks.
        nodes: number of machines that hold these ranks.
    """

    size: int
    nodes: int


@dataclass(frozen=True)
class Message:
    """Equal collectives of one kind in a step.

    Attributes:
        kind: sharding, gradients, sync_batch_norm, sinkhorn or optimizer.
        op: the collective.
        size: bytes of the whole tensor.
        count: number of collectives per step.
        ranks: the ranks that take part.
        when: the pass that runs at the same time, or `waiting`.
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
        """Seconds of all `count` collectives, one after the other."""
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
    layout: Layout,
    batch: Batch,
    *,
    prototypes: int,
    sinkhorn: Sinkhorn | None,
    recomputed: frozenset[int] = frozenset(),
) -> list[Message]:
    """Lists the messages of a step.

    Args:
        shape: parameters of the model.
        layout: ranks and sharding.
        batch: images of a rank.
        prototypes: number of prototypes.
        sinkhorn: SwAV's iterations; None for an objective without them.
        recomputed: positions of the recomputed blocks.
    """
    world = Ranks(layout.world, layout.nodes)
    found = [
        *_weights(shape, layout, world, batch, recomputed),
        *_batch_norm(shape, layout, batch),
        *_norms(shape, layout, world, prototypes),
    ]
    if sinkhorn:
        # Row sums of the prototypes, one per iteration, and a maximum; all crops in one message.
        size = FLOAT * prototypes * sinkhorn.crops
        count = batch.gradient_accumulation * (sinkhorn.iterations + 1)
        found.append(Message("sinkhorn", "all_reduce", size, count, world, "waiting"))
    return [message for message in found if message.ranks.size > 1 and message.size]


def _weights(
    shape: Shape, layout: Layout, world: Ranks, batch: Batch, recomputed: frozenset[int]
) -> list[Message]:
    """Gathered weights in the forward pass's type, and reduced gradients in float32."""
    micro_batches = batch.gradient_accumulation
    whole = float(FLOAT * shape.total)
    if layout.strategy == "ddp":
        buckets = math.ceil(whole / DDP_BUCKET)
        return [_split("gradients", "all_reduce", whole, buckets, world, "backward")]
    if not layout.by_unit:
        return _zero_weights(shape, layout, world, batch, recomputed)
    inner, outer = world, None
    if layout.strategy == "hsdp":
        inner = group_of(layout.shards, layout.gpus_per_node)
        outer = Ranks(world.size // layout.shards, math.ceil(world.nodes / inner.nodes))
    sizes = [unit for part in shape.parts for unit in part.unit_bytes(layout.sent_low)]
    gathered, units = float(sum(sizes)), len(sizes)
    found = [
        _split("sharding", "all_gather", gathered, units, inner, "forward", micro_batches),
        _split("gradients", "reduce_scatter", whole, units, inner, "backward", micro_batches),
    ]
    if layout.reshard_after_forward:
        found.append(
            _split("sharding", "all_gather", gathered, units, inner, "backward", micro_batches)
        )
    if outer:
        part = whole / inner.size
        found.append(
            _split("gradients", "all_reduce", part, units, outer, "backward", micro_batches)
        )
    return found


def _zero_weights(
    shape: Shape, layout: Layout, world: Ranks, batch: Batch, recomputed: frozenset[int]
) -> list[Message]:
    whole, zero = float(FLOAT * shape.total), layout.zero
    micro_batches = batch.gradient_accumulation
    buckets = math.ceil(whole / (FLOAT * zero.bucket))
    hidden: When = "backward" if zero.overlap else "waiting"
    if zero.stage == 0:
        return [_split("gradients", "all_reduce", whole, buckets, world, "waiting")]
    if zero.stage < 3:
        times = micro_batches if zero.stage == 2 else 1
        groups = math.ceil(shape.total / MOST_JOINED)
        # A bucket that belongs to several ranks is all-reduced (use_multi_rank_bucket_allreduce).
        return [
            _split("gradients", "all_reduce", whole, buckets, world, hidden, times),
            # The stepped parameters, group by group of joined tensors.
            _split("sharding", "all_gather", whole, groups, world, "waiting"),
        ]
    tensors = [
        (size, layout.sent_low if low else FLOAT)
        for size, low in zip(shape.tensors, shape.low_tensors, strict=True)
    ]
    cut = [size * width for size, width in tensors if size > zero.persistent]
    shared, fetches = float(sum(cut)), max(1, len(cut))
    small = {FLOAT: 0.0, layout.sent_low: 0.0}  # kept whole; gathered once for each type
    for size, width in tensors:
        if size <= zero.persistent:
            small[width] += size * width
    backward = _gathers_backward(shape, zero, recomputed)
    return [
        _split("gradients", "reduce_scatter", whole, buckets, world, hidden, micro_batches),
        _split("sharding", "all_gather", shared, fetches, world, "forward", micro_batches),
        _split("sharding", "all_gather", sum(small.values()), len(small), world, "waiting"),
        _split(
            "sharding", "all_gather", backward * shared, fetches, world, "backward", micro_batches
        ),
    ]


def _gathers_backward(shape: Shape, zero: Zero, recomputed: frozenset[int]) -> float:
    """How often stage 3 gathers the model in the backward pass.

    A recomputed block above the reuse distance is gathered twice (`parallel/zero_limits.py`). What
    is used last in the forward pass stays for the backward pass.
    """
    twice = sum(
        block.whole
        for index, block in enumerate(shape.blocks)
        if index in recomputed and USES * block.whole > zero.reuse
    )
    return 1 + (twice - min(zero.reuse / USES, shape.total)) / shape.total


def _split(
    kind: str, op: Op, size: float, pieces: int, ranks: Ranks, when: When, times: int = 1
) -> Message:
    """Collectives that share `size` bytes in equal `pieces`, `times` a step."""
    return Message(kind, op, size / pieces, pieces * times, ranks, when)


def _batch_norm(shape: Shape, layout: Layout, batch: Batch) -> list[Message]:
    """Statistics forward, gathered in float32 or summed in float64, and two sums backward.

    For each resolution; `parallel/batchnorm_gpu.py` has the reasons.
    """
    ranks = group_of(layout.group_ranks(layout.sync_bn_group_size), layout.gpus_per_node)

    def forward(channels: int) -> tuple[Op, float]:
        if ranks.size <= MOST_GATHERED and not batch.compiled:
            return "all_gather", ranks.size * FLOAT * (2 * channels + 1)
        return "all_reduce", DOUBLE * (2 * channels + 2)

    in_trunk, in_head = shape.norms
    found: list[Message] = []
    for norms, passes in ((in_trunk, len(batch.crop_sizes)), (in_head, 1)):
        times = batch.gradient_accumulation * passes
        for channels in norms:
            sums: tuple[Op, float] = ("all_reduce", FLOAT * 2 * channels)
            for op, size in (forward(channels), sums):
                found.append(Message("sync_batch_norm", op, size, times, ranks, "waiting"))
    return found


def _norms(shape: Shape, layout: Layout, world: Ranks, prototypes: int) -> list[Message]:
    """LARC's squared norms of all tensors and of the prototypes' rows, in float64, if sharded."""
    if not layout.is_sharded:
        return []
    ranks = world
    if layout.strategy == "hsdp":
        ranks = group_of(layout.shards, layout.gpus_per_node)
    return [
        Message("optimizer", "all_reduce", DOUBLE * 2 * len(shape.tensors), 1, ranks, "waiting"),
        Message("optimizer", "all_reduce", DOUBLE * prototypes, 1, ranks, "waiting"),
    ]


def group_of(size: int, per_node: int) -> Ranks:
    """A group of `size` consecutive ranks, with `per_node` ranks on each machine."""
    return Ranks(size, math.ceil(size / per_node))


def bytes_by_kind(found: Sequence[Message]) -> dict[str, float]:
    """Bytes that a rank sends in a step, by kind."""
    kinds = ("sharding", "gradients", "sync_batch_norm", "sinkhorn", "optimizer")
    return {kind: sum(m.sent for m in found if m.kind == kind) for kind in kinds}
