"""The seconds that a step asks of the host, whose work grows with layers and not with pixels.

While a GPU computes, its host starts the next operations. A step takes as long as the slower of the
two, so that a small trunk on a fast GPU waits for its host. The constants are processor seconds of
one core of an Intel Xeon with AMX, `regnety_debug` at 8 to 512 ranks that do not exist
(`python -m harness.host_time`): its tensors are so small that little is left of them but the host's
part. What is compiled makes fewer calls, which was not measured.
"""

from __future__ import annotations

from collections.abc import Collection

from seer_scale.performance.shape import Shape
from seer_scale.planner.job import Batch, Layout

MILLI = 1e-3
# A BatchNorm with what belongs to it (convolution, ReLU, its part of SE and of the sum), for one
# resolution, both passes. Calls into ATen: 49 in a group, 28 alone, 21 again where recomputed.
IN_GROUP, ALONE, AGAIN = 0.9 * MILLI, 0.5 * MILLI, 0.4 * MILLI
# FSDP: gathers and reduction of a unit, and its views of each rank's part.
UNIT, RANK_OF_UNIT = 3.3 * MILLI, 8e-3 * MILLI
# DeepSpeed: a tensor in a micro-batch, by stage.
TENSOR = {1: 0.2 * MILLI, 2: 0.2 * MILLI, 3: 0.7 * MILLI}
UPDATE = 0.1 * MILLI  # a tensor in the optimizer's step


def host_seconds(shape: Shape, layout: Layout, batch: Batch, recomputed: Collection[int]) -> float:
    """Computes the seconds of a step on the host; 0 for compiled blocks, which are not known.

    Args:
        shape: layers and tensors of the model.
        layout: ranks and sharding.
        batch: resolutions and micro-batches of a step.
        recomputed: positions of the recomputed blocks.
    """
    if batch.compiled:
        return 0.0
    in_trunk, in_head = map(len, shape.norms)
    group = layout.group_ranks(layout.sync_bn_group_size)
    again = AGAIN * len(recomputed) / max(1, len(shape.blocks))
    micro_batch = (len(batch.crop_sizes) * in_trunk + in_head) * (IN_GROUP if group > 1 else ALONE)
    micro_batch += len(batch.crop_sizes) * in_trunk * again
    tensors = len(shape.tensors)
    if layout.by_unit:
        units = sum(len(part.units) for part in shape.parts)
        micro_batch += units * (UNIT + layout.shards * RANK_OF_UNIT)
    elif layout.strategy == "zero":
        micro_batch += tensors * TENSOR.get(layout.zero.stage, 0.0)
    return batch.gradient_accumulation * micro_batch + tensors * UPDATE
