"""The definition of a spike: a loss far above the median of the losses before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

WINDOW = 64  # losses to compare with; until so many are known, no loss counts as a spike
LEAST = 0.005  # smallest spread, as a share of the median


class Spike(NamedTuple):
    """A loss that jumped and sends the run back.

    Attributes:
        step: step of the loss.
        loss: the loss.
        threshold: threshold that the loss exceeded.
        samples_seen: position in the stream of images after the step.
    """

    step: int
    loss: float
    threshold: float
    samples_seen: int


def spike_threshold(losses: Sequence[float], mads: float) -> float:
    """Returns the loss above which a step is a spike; infinity until `WINDOW` losses are known.

    The threshold is median + mads * max(MAD, 0.005 * |median|) of the last `WINDOW` losses. MAD is
    the median absolute deviation, 0.67 standard deviations of a normal distribution. A few outliers
    change neither. The second term of the maximum keeps the threshold away from the median on a
    plateau, where losses hardly differ.

    Args:
        losses: finite losses of the steps before, oldest first.
        mads: `train.spike_mads`.
    """
    last = losses[-WINDOW:]
    if len(last) < WINDOW:
        return math.inf
    middle = median(last)
    spread = median(abs(loss - middle) for loss in last)
    return middle + mads * max(spread, LEAST * abs(middle))
