"""The model of a run: its shape, its activations and its recomputed blocks, without memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from seer_scale.errors import ConfigError
from seer_scale.models import MultiCropModel, build_model
from seer_scale.parallel.activation_budget import fewest_recomputed, least_budget
from seer_scale.parallel.activation_profile import ActivationProfile, profile_activations
from seer_scale.parallel.precision import held_as
from seer_scale.performance.shape import Shape, read_shape, regions
from seer_scale.planner.job import Batch
from seer_scale.planner.memory import GIB


@dataclass(frozen=True)
class Model:
    """The values of the section `model` that decide shape and activations.

    Attributes:
        trunk: name of the trunk.
        head_dims: widths of the projection head.
        head_batch_norm: whether BatchNorm follows every hidden layer of the head.
        prototypes: number of prototypes.
    """

    trunk: str
    head_dims: tuple[int, ...]
    head_batch_norm: bool
    prototypes: int

    def build(self, device: torch.device) -> MultiCropModel:
        """Builds the model on a device; the meta device takes no memory."""
        return build_model(
            self.trunk,
            head_dims=self.head_dims,
            head_batch_norm=self.head_batch_norm,
            prototypes=self.prototypes,
            device=device,
        )


@cache
def shape_of(model: Model, heavy: int) -> Shape:
    """Reads the shape of a model; remembers the result.

    Args:
        model: the model.
        heavy: value of `sharding.unit_parameters`; larger layers are units of their own.
    """
    return read_shape(model.build(torch.device("meta")), heavy)


def profile_of(
    model: Model, batch: Batch, micro_batch_size: int, strategy: str
) -> ActivationProfile:
    """Profiles the activations of a micro-batch; remembers the result.

    Args:
        model: the model.
        batch: crops and precision.
        micro_batch_size: number of images, in place of `batch.micro_batch_size`.
        strategy: value of `sharding.strategy`, or a key of `planner.plan.STRATEGIES`.
    """
    crops = zip(batch.crop_counts, batch.crop_sizes, strict=True)
    sizes = tuple((count * micro_batch_size, size) for count, size in crops)
    weights = held_as(strategy, batch.precision, compiled=batch.compiled)
    return _profile(model, sizes, batch.precision, weights)


@cache
def _profile(
    model: Model,
    crops: tuple[tuple[int, int], ...],
    precision: str,
    weights: torch.dtype | None,
) -> ActivationProfile:
    return profile_activations(model.build, crops, precision, weights)


def recomputed_regions(
    shape: Shape,
    profile: ActivationProfile,
    mode: str,
    *,
    groups: Sequence[Sequence[int]] | None,
    budget_gib: float | None,
) -> tuple[tuple[int, ...], ...]:
    """Lists the groups of blocks that are recomputed together, by position in the trunk.

    Args:
        shape: parameters of the model.
        profile: activations of one micro-batch.
        mode: value of `sharding.activation_checkpointing`.
        groups: value of `sharding.checkpoint_groups`.
        budget_gib: GiB that mode `auto:GIB` allows; None for other modes.

    Raises:
        ConfigError: if the activations exceed the budget even with every block recomputed.
    """
    chosen: frozenset[int] = frozenset()
    if budget_gib is not None:
        fewest = fewest_recomputed(profile, int(budget_gib * GIB))
        if fewest is None:
            raise ConfigError(
                f"sharding.activation_checkpointing is {mode}, but the activations of a "
                f"micro-batch take at least {least_budget(profile) / GIB + 5e-4:.3f} GiB, even if "
                "every block is recomputed: allow more GiB or lower train.micro_batch_size"
            )
        chosen = fewest
    return regions(mode, shape.depths, groups, chosen)
