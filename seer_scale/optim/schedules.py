"""Schedules as pure functions of the step, so that a checkpoint holds nothing of them.

The values are SEER's to the digit (arXiv 2103.01988; arXiv 2202.08360), including two habits of
SEER's trainer. The warm-up starts from the learning rate of one node's batch. The cosine
(Loshchilov and Hutter, arXiv 1608.03983, without restarts) is evaluated at the progress of the
whole run, so that the first value after the warm-up is below the peak.
"""

from __future__ import annotations

import math
from typing import Literal

REFERENCE_BATCH = 256  # images that a base learning rate is given for


def scaled_lr(base_lr: float, batch: int) -> float:
    """Scales `base_lr` to `batch` images by the linear rule (Goyal et al., arXiv 1706.02677).

    With the global batch the result is the peak, with one node's batch the start of SEER's warm-up.
    """
    return base_lr * batch / REFERENCE_BATCH


def warmup_start(peak: float, *, nodes: float, floor: float) -> float:
    """Learning rate at the start of the warm-up: `peak` scaled to the batch of one node.

    On a single node that would be the peak, and so no warm-up at all (VISSL drops the warm-up
    silently there, which its users took for a fault). On a single node the result is `floor`.
    """
    return peak / nodes if nodes > 1 else floor


def learning_rate(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    start: float,
    peak: float,
    end: float,
    schedule: Literal["cosine", "constant"],
) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Args:
        step: 0 <= step <= total_steps; the last step of a run is total_steps - 1.
        total_steps: steps of the whole run.
        warmup_steps: steps of the linear rise from `start` towards `peak`.
        start: learning rate of step 0, if there is a warm-up.
        peak: learning rate of "constant" after the warm-up, and highest value of "cosine".
        end: value of "cosine" at `total_steps`; SEER's is peak / 1000.
        schedule: form of the curve after the warm-up.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    if schedule == "constant":
        return peak
    return end + (peak - end) * (1 + math.cos(math.pi * step / total_steps)) / 2


def prototypes_frozen(step: int, freeze_steps: int) -> bool:
    """Whether the prototypes do not move in step `step`, counted from 0 (SwAV, appendix A)."""
    return step < freeze_steps
