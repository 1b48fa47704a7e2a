"""Schedules as pure functions of the step: nothing to save, nothing to restore.

The values are SEER's to the digit (arXiv 2103.01988; arXiv 2202.08360), including two habits of
its trainer: the warm-up starts from the learning rate of one node's batch, and the cosine is
evaluated at the progress of the whole run, so the first value after the warm-up is not the peak.
"""

from __future__ import annotations

import math
from typing import Literal

REFERENCE_BATCH = 256  # images; base learning rates are given per this many


def scaled_lr(base_lr: float, batch: int) -> float:
    """Learning rate of a batch of `batch` images by the linear scaling rule.

    With the global batch it is the peak, with one node's batch the start of SEER's warm-up.
    """
    return base_lr * batch / REFERENCE_BATCH


def warmup_start(peak: float, *, nodes: float, floor: float) -> float:
    """Where the linear warm-up starts: the learning rate scaled to one node's batch.

    On a single node that would be the peak, so no warm-up at all (VISSL drops it silently there,
    which its users took for a fault); there it starts from `floor`.
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
        step: 0 <= step <= total_steps; the value at `total_steps` is where the run would arrive.
        total_steps: steps of the whole run.
        warmup_steps: steps of the linear rise from `start` towards `peak`.
        start: learning rate of step 0, if there is a warm-up.
        peak: learning rate of "constant" after the warm-up, and where "cosine" falls from.
        end: where "cosine" arrives; SEER's is peak / 1000.
        schedule: what follows the warm-up.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    if schedule == "constant":
        return peak
    return end + (peak - end) * (1 + math.cos(math.pi * step / total_steps)) / 2


def prototypes_frozen(step: int, freeze_steps: int) -> bool:
    """Whether the prototypes stand still in step `step`, counted from 0 (SwAV, appendix A)."""
    return step < freeze_steps
