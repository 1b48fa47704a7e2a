"""Numbers and choices of the training loop, fixed for a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainSettings:
    """Numbers and choices of the loop.

    Attributes:
        steps: steps of the whole run.
        accumulation: micro-batches per step.
        global_batch: images per step, over all ranks and micro-batches.
        learning_rate: learning rate of a step, counted from 0.
        frozen_steps: first steps in which the prototypes do not move.
        checkpoint_every: steps between checkpoints.
        max_nonfinite: consecutive non-finite steps that end the run.
        rewind_on_spike: whether a loss that jumps sends the run back to its last checkpoint.
        log_samples: whether the sample ids of every step are recorded.
    """

    steps: int
    accumulation: int
    global_batch: int
    learning_rate: Callable[[int], float]
    frozen_steps: int
    checkpoint_every: int
    max_nonfinite: int
    rewind_on_spike: bool
    log_samples: bool
