"""When a loss counts as a spike: far above the middle of the losses before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

WINDOW = 64  # losses that a spike is held against; before there are so many, none is one
LEAST = 0.005  # of the median, the smallest spread that is reckoned with


class Spike(NamedTuple):
    """The step that a rewind answers, and the position of the stream after it."""

    step: int
    loss: float
    threshold: float
    samples_seen: int


def spike_threshold(losses: Sequence[float], mads: float) -> float:
    """The loss above which a step is a spike; infinite until `WINDOW` losses are known.

    median + mads * max(MAD, 0.005 * |median|) of the last `WINDOW` losses, where MAD is the median
    distance from their median (for a normal distribution 0.67 standard deviations). Neither follows
    a few outliers; on a plateau, where losses hardly differ, a spike is at least 0.5 % a MAD.

    Args:
        losses: finite, oldest first, of the steps before.
        mads: of `train.spike_mads`.
    """
    last = losses[-WINDOW:]
    if len(last) < WINDOW:
        return math.inf
    middle = median(last)
    spread = median(abs(loss - middle) for loss in last)
    return middle + mads * max(spread, LEAST * abs(middle))
