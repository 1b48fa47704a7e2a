"""Learning rate of every step of a fine-tuning, order of every epoch, and checks of both."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from seer_scale import distributed
from seer_scale.data.order import order_key, permute_all
from seer_scale.errors import UserError
from seer_scale.evaluation.options import FinetuneOptions
from seer_scale.models.regnet import trunk_config
from seer_scale.optim.schedules import scaled_lr


def check(options: FinetuneOptions, trunk: str, *, images: int) -> None:
    """Refuses options that do not fit the trunk, the images or the processes.

    Args:
        options: options of the fine-tuning.
        trunk: key of `TRUNKS`.
        images: number of training images.

    Raises:
        UserError: one sentence with the option, its value and what is possible.
    """
    stages, world = len(trunk_config(trunk).stages), distributed.world_size()
    if options.freeze > stages:
        raise UserError(
            f"freeze={options.freeze}, but {trunk} has {stages} stages: set freeze={stages} or less"
        )
    if options.batch > images:
        raise UserError(
            f"batch={options.batch}, but there are {images} training images: set batch={images} "
            "or less"
        )
    if options.batch % (world * options.accumulate):
        raise UserError(
            f"batch={options.batch} cannot be split evenly over {world} processes and "
            f"accumulate={options.accumulate}: choose a multiple of {world * options.accumulate}"
        )


def learning_rate(options: FinetuneOptions, step: int, steps_per_epoch: int) -> float:
    """Returns the learning rate of a step, counted from 0.

    During the warm-up the schedule's value is scaled linearly, from one step's share up to 1.
    """
    epoch = step / steps_per_epoch
    rate = scaled_lr(options.base_lr, options.batch)
    if options.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * epoch / options.epochs)) / 2
    else:
        rate *= options.lr_gamma ** sum(epoch >= end for end in options.lr_steps)
    return rate * min(1.0, (step + 1) / max(1.0, options.warmup_epochs * steps_per_epoch))


def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the order of the images in an epoch, int64 [count]: a function of seed and epoch."""
    return permute_all(count, order_key(seed, "fine-tuning", epoch))
