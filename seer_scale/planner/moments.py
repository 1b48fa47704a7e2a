"""The moments of a step, and the bytes that exist at each beside weights and optimizer state.

The forward pass, the backward pass (block by block) and the optimizer's step are walked in order:
which activations are still held, which weights are gathered, which gradients exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from seer_scale.optim.groups import MOST_HELD
from seer_scale.parallel.activation_profile import ActivationProfile
from seer_scale.parallel.state_bytes import StateBytes
from seer_scale.performance.shape import FLOAT, Part, Shape
from seer_scale.planner.job import DOUBLE, Layout


@dataclass(frozen=True)
class Moment:
    """Bytes of a rank at one moment, beside parameters, optimizer state and buffers."""

    gradients: float
    activations: float
    communication: float
    gathered: float

    @property
    def total(self) -> float:
        """Sum in bytes."""
        return self.gradients + self.activations + self.communication + self.gathered


class Moments:
    """Walks through one step of a rank.

    Args:
        shape: parameters of the model.
        profile: activations of one micro-batch.
        regions: groups of blocks that are recomputed together.
        layout: ranks and sharding.
        state: bytes of weights, gradients and optimizer state.
        on_touch: whether memory counts only once it is written to, as on a CPU.
    """

    def __init__(
        self,
        shape: Shape,
        profile: ActivationProfile,
        regions: Sequence[Sequence[int]],
        layout: Layout,
        state: StateBytes,
        on_touch: bool,
    ) -> None:
        self._shape, self._profile, self._layout = shape, profile, layout
        self._state, self._on_touch = state, on_touch
        self._zero, self._stage = layout.zero, layout.zero.stage
        self._alone = layout.world == 1
        self._parts = shape.parts
        self._region_of = {block: region for region in regions for block in region}

    def fullest(self) -> Moment:
        """The moment of a step that takes most memory."""
        moments = [*self._forward(), *self._backward(), self._step()]
        return max(moments, key=lambda moment: moment.total)

    def _step(self) -> Moment:
        """The optimizer's step: all gradients, and the temporaries of one tensor's update."""
        tensor = FLOAT * max(self._shape.tensors) / self._layout.shards
        # The rows of the prototypes are normalised in float64.
        rows = (FLOAT + 2 * DOUBLE) * self._shape.prototypes / self._layout.shards
        if self._stage == 3:  # a copy of a joined group's gradient
            tensor = FLOAT * min(MOST_HELD, self._shape.total / self._layout.shards)
        return Moment(self._state.gradients, max(tensor, rows), self._standing(), 0)

    def _forward(self) -> list[Moment]:
        """One moment for every part under ZeRO 3, which gathers ahead as much as may be whole.

        A bucket arrives in one piece and is copied to its tensors when the first of them is used.
        The bucket is freed when the last of them is used.
        """
        if self._stage != 3 or self._alone:
            return []
        whole, bucket = self._partitioned(self._parts), self._zero.prefetch
        live = min(whole, self._zero.kept)
        moments = []
        for index, held in enumerate(self._activations()[1]):
            before = self._partitioned(self._parts[:index])
            arrived = min(bucket, whole - before // bucket * bucket) if bucket else 0
            fetched = FLOAT * live + self._layout.sent_low * arrived
            moments.append(Moment(self._state.gradients, held, self._standing(), fetched))
        return moments

    def _backward(self) -> list[Moment]:
        """One moment for the head, every block and the stem; then the end of the pass."""
        activations, held = self._activations()
        done = 0
        moments = []
        by_unit = self._layout.by_unit and not self._alone
        for index in range(len(self._parts) - 1, -1, -1):
            behind, done = done, done + self._parts[index].whole
            # A full bucket is reduced while the pass goes on.
            reduction = self._reduction() if done > self._zero.bucket else 0
            moments.append(
                Moment(
                    self._gradients(behind if by_unit else done),
                    activations[index],
                    self._standing() + self._buckets(done) + reduction + self._under_way(index),
                    self._gathered(index),
                )
            )
            if by_unit:
                # The part is done: activations and weights of the part are free. Its gradients
                # exist twice, as autograd left them and as the input of the reduction.
                whole = 2 * FLOAT * max(self._parts[index].units)
                moments.append(Moment(self._gradients(done), held[index], whole, 0))
        # The last bucket is reduced at the end of the pass, full or not.
        last = self._standing() + self._buckets(done) + self._reduction()
        return [*moments, Moment(self._state.gradients, float(self._profile.ends), last, 0)]

    def _activations(self) -> tuple[list[float], list[float]]:
        """Per part: bytes while its backward pass runs, and bytes held by the parts before it."""
        profile = self._profile
        most = [float(profile.ends + profile.stem.peak)]
        held = profile.ends + profile.stem.held
        before = [float(profile.ends)]
        for index, block in enumerate(profile.blocks):
            region = self._region_of.get(index)
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
                if index == region[-1]:  # only the output of a region is held
                    held += block.recomputed.held
        most.append(held + profile.head.peak)
        return most, [*before, held]

    def _gradients(self, done: int) -> float:
        """Bytes of kept gradients after the backward pass of `done` parameters."""
        all_of_them, total = self._state.gradients, self._shape.total
        if self._layout.strategy == "ddp" and not self._alone:
            return all_of_them  # views of buckets that are never freed
        if self._stage == 3:
            return all_of_them  # DeepSpeed keeps room for its part
        if self._stage == 2 and not self._alone:  # its part of the buckets that were reduced
            done = done // self._zero.bucket * self._zero.bucket
        return all_of_them * min(1.0, done / total)

    def _standing(self) -> float:
        """Bytes of ZeRO 3's bucket, which always exists."""
        if self._stage != 3:
            return 0
        size = self._zero.bucket
        return FLOAT * (min(size, self._shape.total) if self._on_touch else size)

    def _reduction(self) -> float:
        """Bytes that ZeRO copies out of a bucket in order to reduce it."""
        if self._stage == 0 or self._alone:
            return 0
        # gloo reduces and scatters a copy of its own.
        copies = 2 if self._stage == 3 and self._on_touch else 1
        return copies * FLOAT * min(self._zero.bucket, self._shape.total)

    def _buckets(self, done: int) -> float:
        """Bytes of ZeRO 1 and 2's buckets after the backward pass of `done` parameters."""
        if self._stage not in (1, 2) or self._alone:
            return 0
        size = self._zero.bucket * (2 if self._zero.overlap else 1)
        return FLOAT * (min(size, done) if self._on_touch else size)

    def _under_way(self, index: int) -> float:
        """Bytes of whole gradients that are not reduced yet, in the backward pass of a part."""
        if self._layout.by_unit:
            # The part's own gradients come while its activations go; `_backward` adds its end. The
            # part behind it has left the input of its reduction.
            behind = [max(part.units) for part in self._parts[index + 1 : index + 2]]
            return 0 if self._alone else FLOAT * sum(behind)
        ddp_alone = self._alone and self._layout.strategy == "ddp"
        return 0 if ddp_alone else FLOAT * self._parts[index].largest_tensor

    def _gathered(self, index: int) -> float:
        """Bytes of gathered weights in the backward pass of a part."""
        if self._stage == 3:
            return FLOAT * self._gathered_by_zero(index)
        if not self._layout.by_unit:
            return 0
        units = [part.unit_bytes(self._layout.held_low) for part in self._parts]
        if not self._layout.reshard_after_forward:
            return sum(sum(part) for part in units[: index + 1])
        region = self._region_of.get(index - 1)
        if region is None:
            here = sum(sorted(units[index])[-2:])
        else:  # the recomputation gathers all weights of the region and frees none early
            here = sum(sum(units[block + 1]) for block in region if block + 1 <= index)
        first = index if region is None else region[0] + 1
        ahead = units[max(0, first - self._layout.prefetch) : first]
        return here + sum(max(part) for part in ahead) + sum(units[0]) * (index > 0)

    def _gathered_by_zero(self, index: int) -> float:
        if self._alone:
            return 0
        parts = self._parts[: index + 1]
        least = max(part.largest_layer for part in parts) + self._zero.prefetch
        # ZeRO 3 does not free weights that are used again soon.
        return min(self._partitioned(parts), max(self._zero.kept, least))

    def _partitioned(self, parts: Sequence[Part]) -> float:
        """Elements of parts that ZeRO 3 does not keep whole."""
        return self._partitioned_share * sum(part.whole for part in parts)

    @cached_property
    def _partitioned_share(self) -> float:
        cut = sum(size for size in self._shape.tensors if size > self._zero.persistent)
        return cut / self._shape.total
