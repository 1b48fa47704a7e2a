"""The optimizer of a sharded model: settings per tensor, LARC over the slices of all ranks."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from seer_scale.models import paddings_of
from seer_scale.optim.groups import parameter_groups
from seer_scale.optim.loss_scale import LossScale
from seer_scale.optim.options import OptimizerOptions
from seer_scale.optim.slice_sgd import SliceSGD

PROTOTYPES = frozenset({"prototypes.weight"})


def tensor_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Lists the parameter groups of a model, one per tensor; prototypes keep rows of length 1."""
    return parameter_groups(model, unit_rows=PROTOTYPES, paddings=paddings_of(model))


def build_optimizer(
    groups: list[dict[str, Any]],
    options: OptimizerOptions,
    loss_scale: LossScale | None,
    *,
    shards: int = 1,
    shard_group: ProcessGroup | None = None,
) -> SliceSGD:
    """Builds the optimizer of a sharded model.

    Args:
        groups: from `tensor_groups`, perhaps joined.
        options: numbers of the optimizer.
        loss_scale: loss scale of float16, or None.
        shards: number of ranks that hold one part of each tensor.
        shard_group: these ranks; None for all.
    """
    return SliceSGD(
        groups,
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
        trust_coefficient=options.trust_coefficient,
        shards=shards,
        shard_group=shard_group,
        loss_scale=loss_scale,
        momentum_on_host=options.momentum_on_host,
    )
