"""Bytes of a rank by kind, at the moment of a step that needs most.

What a strategy keeps is `parallel/state_bytes.py`, exact; activations are profiled by
`parallel/activation_profile.py`, on tensors without memory. Here the backward pass is walked block
by block: what is still held, what is gathered, which gradients there are by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from seer_scale.config import RunConfig
from seer_scale.parallel.activation_profile import ActivationProfile
from seer_scale.parallel.state_bytes import FLOAT, StateBytes, state_bytes
from seer_scale.performance.shape import Part, Shape

GIB = 2**30
DOUBLE = 8


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank; the sum is what it takes at its fullest moment.

    Attributes:
        parameters: what the forward pass reads, as the rank keeps it.
        gradients: once all of them exist.
        optimizer: momentum, and ZeRO's masters.
        buffers: of BatchNorm.
        activations: what the passes take beyond all else. Early in the backward pass activations
            are many and gradients few: they use the room that gradients fill later, and only what
            exceeds it counts.
        communication: buckets, and whole gradients that are about to be reduced.
        gathered: whole weights beside the rank's own part of them.
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
        """The sum."""
        return float(sum(asdict(self).values()))

    def gib(self) -> dict[str, float]:
        """GiB by kind, and their `total`."""
        kinds = {**asdict(self), "total": self.total}
        return {kind: number / GIB for kind, number in kinds.items()}


@dataclass(frozen=True)
class _Moment:
    """Bytes beside parameters, optimizer and buffers."""

    gradients: float
    activations: float
    communication: float
    gathered: float

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.communication + self.gathered


def memory_of(
    shape: Shape,
    profile: ActivationProfile,
    regions: Sequence[Sequence[int]],
    config: RunConfig,
    *,
    shards: int,
    world: int,
    zero: Mapping[str, Any],
    on_touch: bool = False,
) -> Memory:
    """What a rank takes.

    Args:
        shape: of the model.
        profile: of one micro-batch.
        regions: blocks that are recomputed together.
        config: of the run.
        shards: ranks that share one copy.
        world: all ranks.
        zero: DeepSpeed's `zero_optimization`, for strategy `zero`.
        on_touch: whether memory counts only once it is written to, as on a CPU.
    """
    strategy, stage = config.sharding.strategy, int(zero.get("stage", 0))
    state = state_bytes(
        shape.padded(strategy, shards, stage=stage),
        strategy,
        shards,
        stage=stage,
        persistent=int(zero.get("stage3_param_persistence_threshold", 0)),
    )
    if stage == 1:  # of the tensors, which are not filled up
        state = StateBytes(state.parameters, float(FLOAT * shape.total), state.optimizer)
    if config.optim.momentum_on_host:
        state = StateBytes(state.parameters, state.gradients, FLOAT * max(shape.tensors) / shards)
    if config.optim.fuse_backward:  # a unit's at a time
        most = max(part.whole for part in (shape.stem, *shape.blocks, shape.top))
        state = StateBytes(state.parameters, FLOAT * most / shards, state.optimizer)
    walk = _Walk(shape, profile, regions, config, state, shards, world, zero, on_touch)
    moments = [*walk.forward(), *walk.backward(), walk.step()]
    fullest = max(moments, key=lambda moment: moment.total)
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


class _Walk:
    """The moments of a step."""

    def __init__(
        self,
        shape: Shape,
        profile: ActivationProfile,
        regions: Sequence[Sequence[int]],
        config: RunConfig,
        state: StateBytes,
        shards: int,
        world: int,
        zero: Mapping[str, Any],
        on_touch: bool,
    ) -> None:
        self.shape, self.profile, self.config, self.state = shape, profile, config, state
        self.shards, self.world, self.zero, self.on_touch = shards, world, zero, on_touch
        self.stage = int(zero.get("stage", 0))
        self.parts: list[Part] = [shape.stem, *shape.blocks, shape.top]
        self.region_of = {block: region for region in regions for block in region}

    def step(self) -> _Moment:
        """The optimizer's: all gradients, and what one tensor's update takes."""
        tensor = FLOAT * max(self.shape.tensors) / self.shards
        # Rows are brought to length one in float64.
        rows = (FLOAT + 2 * DOUBLE) * self.shape.prototypes / self.shards
        return _Moment(self.state.gradients, max(tensor, rows), self._standing(), 0)

    def forward(self) -> list[_Moment]:
        """Of stage 3, one moment for every part: it fetches ahead as much as may be whole at once.

        A bucket arrives in one piece, is copied out to its tensors when the first of them is
        needed, and goes when the last of them is.
        """
        if self.stage != 3 or self.world == 1:
            return []
        whole, bucket = self._partitioned(self.parts), self._prefetched()
        live = min(whole, self._live())
        moments = []
        for index, held in enumerate(self._activations()[1]):
            before = self._partitioned(self.parts[:index])
            arrived = min(bucket, whole - before // bucket * bucket) if bucket else 0
            fetched = FLOAT * (live + arrived)
            moments.append(_Moment(self.state.gradients, held, self._standing(), fetched))
        return moments

    def backward(self) -> list[_Moment]:
        """One moment for the head, every block and the stem."""
        activations, held = self._activations()
        done = 0
        moments = []
        by_unit = self.config.sharding.strategy in ("fsdp", "hsdp") and self.world > 1
        for index in range(len(self.parts) - 1, -1, -1):
            behind, done = done, done + self.parts[index].whole
            # A bucket that is full is reduced while the pass goes on.
            reduction = self._reduction() if done > self._bucket() else 0
            moments.append(
                _Moment(
                    self._gradients(behind if by_unit else done),
                    activations[index],
                    self._standing() + self._buckets(done) + reduction + self._under_way(index),
                    FLOAT * self._gathered(index),
                )
            )
            if by_unit:
                # The part is done: its activations and weights are free, its gradients are there
                # as autograd left them and as the reduction's input.
                whole = 2 * FLOAT * max(self.parts[index].units)
                moments.append(_Moment(self._gradients(done), held[index], whole, 0))
        # The last bucket is reduced when the pass is over, full or not.
        last = self._standing() + self._buckets(done) + self._reduction()
        return [*moments, _Moment(self.state.gradients, float(self.profile.ends), last, 0)]

    def _activations(self) -> tuple[list[float], list[float]]:
        """Bytes while the backward pass is in each part, and what of them is held before it."""
        profile = self.profile
        most = [float(profile.ends + profile.stem.peak)]
        held = profile.ends + profile.stem.held
        before = [float(profile.ends)]
        for index, block in enumerate(profile.blocks):
            region = self.region_of.get(index)
            before.append(held)
            if region is None:
                most.append(held + block.kept.peak)
                held += block.kept.held
            elif len(region) == 1:
                most.append(held + block.recomputed.peak)
                held += block.recomputed.held
            else:
                inside = sum(profile.blocks[b].kept.held for b in region if b < index)
                before[-1] += inside
                most.append(held + inside + block.kept.peak)
                if index == region[-1]:  # only what leaves a region is held
                    held += block.recomputed.held
        most.append(held + profile.head.peak)
        return most, [*before, held]

    def _gradients(self, done: int) -> float:
        """Bytes of kept gradients, once the backward pass has left `done` parameters behind."""
        if self.config.sharding.strategy == "ddp" and self.world > 1:
            return self.state.gradients  # views of buckets that are never freed
        if self.stage == 3:
            return self.state.gradients  # DeepSpeed keeps room for its part
        if self.stage == 2 and self.world > 1:  # its part of the buckets that were reduced
            size = self._bucket()
            return self.state.gradients * min(1.0, done // size * size / self.shape.total)
        return self.state.gradients * min(1.0, done / self.shape.total)

    def _standing(self) -> float:
        """Stage 3's bucket, which is always there."""
        if self.stage != 3:
            return 0
        size = self._bucket()
        return FLOAT * (min(size, self.shape.total) if self.on_touch else size)

    def _reduction(self) -> float:
        """What ZeRO copies out of a bucket to reduce it."""
        if self.stage == 0 or self.world == 1:
            return 0
        # gloo reduces and scatters a copy of its own.
        copies = 2 if self.stage == 3 and self.on_touch else 1
        return copies * FLOAT * min(self._bucket(), self.shape.total)

    def _buckets(self, done: int) -> float:
        """Of the backward pass, which fills them with gradients."""
        if self.stage not in (1, 2) or self.world == 1:
            return 0
        size = self._bucket() * (2 if self.zero.get("overlap_comm") else 1)
        return FLOAT * (min(size, done) if self.on_touch else size)

    def _bucket(self) -> int:
        return int(self.zero.get("reduce_bucket_size", 500_000_000))

    def _under_way(self, index: int) -> float:
        """Whole gradients that are not reduced yet."""
        part = self.parts[index]
        if self.config.sharding.strategy in ("fsdp", "hsdp"):
            # The part's own come while its activations go; see `backward` for when it is done. The
            # part behind it has left the input of its reduction.
            behind = [max(part.units) for part in self.parts[index + 1 : index + 2]]
            return FLOAT * sum(behind) if self.world > 1 else 0
        alone = self.world == 1 and self.config.sharding.strategy == "ddp"
        return 0 if alone else FLOAT * part.largest_tensor

    def _gathered(self, index: int) -> float:
        """Parameters that are whole beside the rank's own."""
        strategy = self.config.sharding.strategy
        if self.stage == 3:
            return self._gathered_by_zero(index)
        if strategy not in ("fsdp", "hsdp"):
            return 0
        if not self.config.sharding.reshard_after_forward:
            return sum(part.whole for part in self.parts[: index + 1])
        region = self.region_of.get(index - 1)
        if region is None:
            here = sum(sorted(self.parts[index].units)[-2:])
        else:  # the recomputation gathers all and frees none before its turn
            here = sum(self.parts[block + 1].whole for block in region if block + 1 <= index)
        first = index if region is None else region[0] + 1
        ahead = self.parts[max(0, first - self.config.sharding.prefetch) : first]
        return here + sum(max(part.units) for part in ahead) + self.shape.stem.whole * (index > 0)

    def _gathered_by_zero(self, index: int) -> float:
        if self.world == 1:
            return 0
        parts = self.parts[: index + 1]
        least = max(part.largest_layer for part in parts) + self._prefetched()
        # What will be used again soon stays.
        return min(self._partitioned(parts), max(self._live(), least))

    def _partitioned(self, parts: Sequence[Part]) -> float:
        """Parameters of parts that stage 3 does not keep whole."""
        return self._partitioned_share * sum(part.whole for part in parts)

    @cached_property
    def _partitioned_share(self) -> float:
        small = int(self.zero.get("stage3_param_persistence_threshold", 0))
        return sum(size for size in self.shape.tensors if size > small) / self.shape.total

    def _prefetched(self) -> int:
        return int(self.zero.get("stage3_prefetch_bucket_size", 50_000_000))

    def _live(self) -> int:
        return int(self.zero.get("stage3_max_live_parameters", 1_000_000_000))
