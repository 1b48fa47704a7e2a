"""Activation checkpointing `auto`: recompute the fewest blocks whose activations fit a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from seer_scale.errors import ConfigError
from seer_scale.models import MultiCropModel, align_channels
from seer_scale.parallel.activation_profile import ActivationProfile, profile_activations

GIB = 2**30


@dataclass(frozen=True)
class RecomputePlan:
    """Blocks to recompute, and the memory that a micro-batch then needs.

    Attributes:
        recomputed: positions of the blocks in the trunk, counted through all stages.
        blocks: number of blocks of the trunk.
        peak: largest number of bytes of activations, as profiled.
        budget: GiB that were allowed.
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
    align: int = 1,
    weights: torch.dtype | None = None,
) -> RecomputePlan:
    """Profiles the model and chooses the blocks; every rank computes the same plan by itself.

    The budget covers the activations of one micro-batch on a rank (see `activation_profile`), not
    weights, gradients or optimizer state.

    Args:
        build: makes the model on the given device.
        crops: number of images of a micro-batch and their size in pixels, per resolution.
        precision: fp32, bf16, amp-o1 or apex-o1.
        budget: GiB per rank.
        align: multiple that the trunk's channel groups are padded to in training.
        weights: type of the gathered weights, from `precision.held_as`.

    Raises:
        ConfigError: if no choice of blocks fits.
    """

    def build_aligned(device: torch.device) -> MultiCropModel:
        model = build(device)
        align_channels(model.trunk, align)
        return model

    profile = profile_activations(build_aligned, crops, precision, weights)
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
    """Finds the fewest blocks to recompute within `budget` bytes; None if no choice fits.

    The result is exact, by dynamic programming over the blocks. Earlier blocks matter to a later
    one only by the bytes that they hold, so of all choices of k earlier blocks only the choice that
    holds the fewest bytes is kept. Equally few blocks are decided by the bytes held at the end.

    Returns:
        positions of the blocks in the trunk.
    """
    if profile.ends + profile.stem.peak > budget:
        return None
    # Number of blocks recomputed so far -> fewest bytes held before the next block, and the choice.
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
    """Finds the smallest budget in bytes that some choice of blocks fits, by bisection."""
    low, high = 0, profile.peak(frozenset(range(len(profile.blocks))))
    while high - low > 1:
        middle = (low + high) // 2
        if fewest_recomputed(profile, middle) is None:
            low = middle
        else:
            high = middle
    return high
