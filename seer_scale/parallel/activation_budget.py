"""Activation checkpointing `auto`: the fewest recomputed blocks whose activations fit a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from seer_scale.errors import ConfigError
from seer_scale.models import MultiCropModel
from seer_scale.parallel.activation_profile import ActivationProfile, profile_activations

GIB = 2**30


@dataclass(frozen=True)
class RecomputePlan:
    """Which blocks to recompute, by position in the trunk, and what a micro-batch takes then.

    Attributes:
        recomputed: positions, counted through the stages.
        blocks: how many the trunk has.
        peak: bytes of activations, as profiled.
        budget: GiB.
    """

    recomputed: frozenset[int]
    blocks: int
    peak: int
    budget: float

    def __str__(self) -> str:
        return (
            f"activation checkpointing auto:{self.budget:g} recomputes {len(self.recomputed)} of "
            f"{self.blocks} blocks: activations take {self.peak / GIB:.2f} of {self.budget:g} GiB"
        )


def plan_recompute(
    build: Callable[[torch.device], MultiCropModel],
    *,
    crops: Sequence[tuple[int, int]],
    precision: str,
    budget: float,
) -> RecomputePlan:
    """Profiles the model and chooses; every rank comes to the same plan by itself.

    The budget is for what one micro-batch leaves on a rank in its forward and backward pass (see
    `activation_profile`), not for weights, gradients or optimizer state.

    Args:
        build: makes the model on the device it is given.
        crops: per resolution the images of a micro-batch and their size in pixels.
        precision: of `train.precision`.
        budget: GiB per rank.

    Raises:
        ConfigError: if no choice of blocks fits.
    """
    profile = profile_activations(build, crops, precision)
    recomputed = fewest_recomputed(profile, int(budget * GIB))
    if recomputed is None:
        least = math.ceil(least_budget(profile) / GIB * 1000) / 1000
        shapes = " + ".join(f"{count} images of {size} pixels" for count, size in crops)
        raise ConfigError(
            f"sharding.activation_checkpointing is auto:{budget:g}, but the activations of a "
            f"micro-batch ({shapes}) take at least {least:.3f} GiB, whatever is recomputed: set it "
            f"to auto:{least:.3f} or more, or lower train.micro_batch_size"
        )
    return RecomputePlan(recomputed, len(profile.blocks), profile.peak(recomputed), budget)


def fewest_recomputed(profile: ActivationProfile, budget: int) -> frozenset[int] | None:
    """Positions of the fewest blocks to recompute within `budget` bytes; None if nothing fits.

    Exact, by dynamic programming over the blocks: what lies before a block matters only by the
    bytes it holds, so of all choices of k earlier blocks the one that holds least is enough. Among
    equally few the one that holds least in the end.
    """
    if profile.ends + profile.stem.peak > budget:
        return None
    # Number recomputed so far -> least bytes held before the next block, and by which choice.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (profile.ends + profile.stem.held, ())}
    for index, block in enumerate(profile.blocks):
        longer: dict[int, tuple[int, tuple[int, ...]]] = {}
        for held, chosen in best.values():
            for cost, choice in ((block.kept, chosen), (block.recomputed, (*chosen, index))):
                if held + cost.peak <= budget:
                    option = (held + cost.held, choice)
                    longer[len(choice)] = min(longer.get(len(choice), option), option)
        best = longer
    fitting = [choice for held, choice in best.values() if held + profile.head.peak <= budget]
    if not fitting:
        return None
    fewest = min(fitting, key=len)
    return frozenset(fewest)


def least_budget(profile: ActivationProfile) -> int:
    """The smallest budget in bytes that some choice of blocks fits, by bisection."""
    low, high = 0, profile.peak(frozenset(range(len(profile.blocks))))
    while high - low > 1:
        middle = (low + high) // 2
        if fewest_recomputed(profile, middle) is None:
            low = middle
        else:
            high = middle
    return high
