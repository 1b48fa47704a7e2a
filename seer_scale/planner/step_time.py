"""The seconds of a step, term by term.

Convolutions and matrix products run at `efficiency` x peak. BatchNorm, activation functions,
squeeze-and-excitation (SE) and additions run at the bandwidth of memory, collectives at that of
the links. Gathering and reducing hide behind the pass that runs at the same time, except for the
first or last piece; all other collectives are waited for. The host starts kernels meanwhile
(`planner/host_time.py`); what it takes longer is waited for. Loading of images and slow ranks are
not counted. docs/planner.md says where the constants come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from seer_scale.models import RegNetConfig
from seer_scale.performance.flops import Flops, trunk_layers
from seer_scale.performance.hardware import Hardware
from seer_scale.performance.shape import FLOAT
from seer_scale.planner.communication import Message
from seer_scale.planner.job import Batch

# How often each element of a BatchNorm's input passes through memory. Forward: statistics 1,
# normalisation 2, ReLU, SE's product or the residual sum 3. Backward: sums 2, gradient 3, ReLU, SE
# or the residual sum 3. A compiled block fuses some of these, which is not counted.
FORWARD_PASSES, BACKWARD_PASSES = 6, 8
# The same for an optimizer step in float32: norms 2, update 3, decay 3, momentum 3, weights 3.
OPTIMIZER_PASSES = 14
HALF = 2  # bytes of a float16 or bfloat16


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by term; their sum is the time of the step.

    Attributes:
        forward: convolutions and matrix products of the forward pass.
        backward: convolutions and matrix products of the backward pass.
        recompute: convolutions and matrix products of recomputed blocks.
        memory_bound: all other layers, in both passes and recomputed.
        sync_batch_norm: waiting for BatchNorm statistics.
        sharding: gathering weights, as far as no pass hides it.
        gradients: reducing gradients, as far as the backward pass does not hide it.
        sinkhorn: waiting for the sums of SwAV's codes.
        optimizer: memory traffic of the update, and waiting for LARC's norms.
        host: waiting for the host, which takes longer than all of the above; 0 on a CPU, where it
            is a part of them.
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
    host: float

    @property
    def total(self) -> float:
        """Sum of all terms in seconds."""
        return float(sum(asdict(self).values()))


def step_time(
    trunk: RegNetConfig,
    flops: Flops,
    batch: Batch,
    hardware: Hardware,
    found: Sequence[Message],
    *,
    recomputed: frozenset[int],
    held_parameters: float,
    on_host: float,
) -> StepTime:
    """Computes the seconds of a step.

    Args:
        trunk: configuration of the trunk.
        flops: operations per image.
        batch: images of a rank.
        hardware: profile of every rank.
        found: messages of a step.
        recomputed: positions of the recomputed blocks.
        held_parameters: number of elements that the rank's optimizer updates.
        on_host: seconds that the host needs to start it all.
    """
    images = batch.images
    rate = hardware.efficiency * hardware.peak(batch.precision)
    memory = hardware.bandwidth_gb_s.bytes_per_second
    forward = images * flops.forward / rate
    backward = images * (flops.training - flops.forward) / rate
    recompute = images * flops.recompute / rate
    ahead, behind = (images * n / memory for n in traffic(trunk, batch, recomputed))
    waiting = {
        kind: sum(m.seconds(hardware) for m in found if m.kind == kind and m.when == "waiting")
        for kind in ("sharding", "gradients", "sync_batch_norm", "sinkhorn", "optimizer")
    }
    exposed = _exposed(found, hardware, {"forward": forward + ahead,
                                         "backward": backward + recompute + behind})  # fmt: skip
    step = FLOAT * OPTIMIZER_PASSES * held_parameters / memory
    time = StepTime(
        forward,
        backward,
        recompute,
        ahead + behind,
        waiting["sync_batch_norm"],
        waiting["sharding"] + exposed["sharding"],
        waiting["gradients"] + exposed["gradients"],
        waiting["sinkhorn"],
        waiting["optimizer"] + step,
        host=0.0,
    )
    on_gpu = hardware.generation != "CPU"
    return replace(time, host=max(0.0, on_host - time.total) if on_gpu else 0.0)


def traffic(trunk: RegNetConfig, batch: Batch, recomputed: frozenset[int]) -> tuple[float, float]:
    """Bytes per image that pass through memory between the convolutions.

    Args:
        trunk: configuration of the trunk.
        batch: images of a rank.
        recomputed: positions of the recomputed blocks.

    Returns:
        Bytes of the forward pass; bytes of the backward pass with recomputation.
    """
    width = FLOAT if batch.precision == "fp32" else HALF
    forward = backward = 0.0
    for size, count in zip(batch.crop_sizes, batch.crop_counts, strict=True):
        for layer in trunk_layers(trunk, size):
            if layer.normalised:
                again = FORWARD_PASSES if layer.block in recomputed else 0
                forward += count * layer.outputs * FORWARD_PASSES
                backward += count * layer.outputs * (BACKWARD_PASSES + again)
    return width * forward, width * backward


def _exposed(
    found: Sequence[Message], hardware: Hardware, passes: Mapping[str, float]
) -> dict[str, float]:
    """Seconds, by kind, of messages during a pass that take longer than the pass."""
    exposed = {"sharding": 0.0, "gradients": 0.0}
    for name, computing in passes.items():
        beside = [m for m in found if m.when == name]
        seconds = [m.seconds(hardware) for m in beside]
        if not beside:
            continue
        # Nothing hides the first gather and the last reduction.
        ends = [s / m.count for s, m in zip(seconds, beside, strict=True)]
        visible = max(sum(seconds) - computing, max(ends))
        for message, its in zip(beside, seconds, strict=True):
            exposed[message.kind] += visible * its / sum(seconds)
    return exposed
