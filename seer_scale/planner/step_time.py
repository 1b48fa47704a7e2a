"""The time of a step and its terms.

Convolutions at `efficiency` x peak; BatchNorm, activations, SE and additions at the speed of
memory; collectives at that of the links. What is reduced or gathered ahead hides behind the pass
it runs beside, except for its first or last piece; the others wait. Launching kernels, loading
images and slow ranks are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from seer_scale.config import RunConfig
from seer_scale.models import RegNetConfig
from seer_scale.performance.flops import Flops, trunk_layers
from seer_scale.performance.hardware import Hardware
from seer_scale.planner.communication import Message

# How often an element of a BatchNorm's input passes through memory. Forward: statistics 1,
# normalisation 2, ReLU, SE's product or the residual sum 3. Backward: sums 2, gradient 3, the
# group's correction 3, of ReLU, SE or the sum 3.
FORWARD_PASSES, BACKWARD_PASSES = 6, 11
# Of an optimizer step, in float32: norms 2, update 3, decay 3, momentum 3, weights 3.
OPTIMIZER_PASSES = 14
FLOAT, HALF = 4, 2


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; the sum is the step's.

    Attributes:
        forward: convolutions and matrix products.
        backward: the same.
        recompute: those of the blocks that are recomputed.
        memory_bound: everything between the convolutions, recomputed too.
        sync_batch_norm: waiting for statistics.
        sharding: gathering weights, as far as no pass hides it.
        gradients: reducing them, as far as the backward pass does not hide it.
        sinkhorn: waiting for the sums of codes.
        optimizer: its traffic and its norms.
    """

    forward: float
    backward: float
    recompute: float
    memory_bound: float
    sync_batch_norm: float
    sharding: float
    gradients: float
    sinkhorn: float
    optimizer: float

    @property
    def total(self) -> float:
        """The sum."""
        return float(sum(asdict(self).values()))


def step_time(
    trunk: RegNetConfig,
    flops: Flops,
    config: RunConfig,
    hardware: Hardware,
    found: Sequence[Message],
    *,
    recomputed: frozenset[int],
    held_parameters: float,
) -> StepTime:
    """Seconds of a step.

    Args:
        trunk: of the model.
        flops: per image.
        config: of the run.
        hardware: of every rank.
        found: messages of a step.
        recomputed: positions of the blocks that are recomputed.
        held_parameters: elements that the rank's optimizer steps.
    """
    train = config.train
    images = train.micro_batch_size * train.gradient_accumulation
    rate = hardware.efficiency * hardware.peak(train.precision)
    memory = hardware.bandwidth_gb_s.bytes_per_second
    forward = images * flops.forward / rate
    backward = images * (flops.training - flops.forward) / rate
    recompute = images * flops.recompute / rate
    ahead, behind = (images * n / memory for n in traffic(trunk, config, recomputed))
    waiting = {
        kind: sum(m.seconds(hardware) for m in found if m.kind == kind and m.when == "waiting")
        for kind in ("sharding", "gradients", "sync_batch_norm", "sinkhorn", "optimizer")
    }
    exposed = _exposed(found, hardware, {"forward": forward + ahead,
                                         "backward": backward + recompute + behind})  # fmt: skip
    step = FLOAT * OPTIMIZER_PASSES * held_parameters / memory
    return StepTime(
        forward,
        backward,
        recompute,
        ahead + behind,
        waiting["sync_batch_norm"],
        waiting["sharding"] + exposed["sharding"],
        waiting["gradients"] + exposed["gradients"],
        waiting["sinkhorn"],
        waiting["optimizer"] + step,
    )


def traffic(
    trunk: RegNetConfig, config: RunConfig, recomputed: frozenset[int]
) -> tuple[float, float]:
    """Bytes per image between the convolutions: forward; backward with recomputation."""
    width = FLOAT if config.train.precision == "fp32" else HALF
    forward = backward = 0.0
    for size, count in zip(config.data.crop_sizes, config.data.crop_counts, strict=True):
        for layer in trunk_layers(trunk, size):
            if layer.normalised:
                again = FORWARD_PASSES if layer.block in recomputed else 0
                forward += count * layer.outputs * FORWARD_PASSES
                backward += count * layer.outputs * (BACKWARD_PASSES + again)
    return width * forward, width * backward


def _exposed(
    found: Sequence[Message], hardware: Hardware, passes: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of what runs beside a pass and is not hidden by it, by kind."""
    exposed = {"sharding": 0.0, "gradients": 0.0}
    for name, computing in passes.items():
        beside = [m for m in found if m.when == name]
        seconds = [m.seconds(hardware) for m in beside]
        if not beside:
            continue
        # The first gather has nothing to hide behind, nor has the last reduction.
        ends = [s / m.count for s, m in zip(seconds, beside, strict=True)]
        visible = max(sum(seconds) - computing, max(ends))
        for message, its in zip(beside, seconds, strict=True):
            exposed[message.kind] += visible * its / sum(seconds)
    return exposed
