"""Conversion of a model's BatchNorm layers to groups of ranks, and the mean over all groups.

The groups are those of VISSL's `SYNC_BN_CONFIG.GROUP_SIZE`, which SEER was trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from seer_scale import distributed
from seer_scale.parallel.batchnorm import GroupedSyncBatchNorm

_Model = TypeVar("_Model", bound=nn.Module)


@cache
def _groups(world_size: int, size: int) -> tuple[dist.ProcessGroup, ...]:
    """Contiguous groups of `size` ranks; made once, by every rank in the same order."""
    groups = []
    for first in range(0, world_size, size):
        group = dist.new_group(list(range(first, min(first + size, world_size))))
        groups.append(cast(dist.ProcessGroup, group))  # an int on ranks outside the group
    return tuple(groups)


def sync_group(group_size: int) -> dist.ProcessGroup | None:
    """Finds this rank's BatchNorm group; None stands for a group of one rank.

    Args:
        group_size: 0 for all ranks, -1 for the ranks of a node, n for contiguous groups of n. The
            last group may be smaller, as in VISSL.
    """
    world = distributed.world_size()
    size = {0: world, -1: distributed.local_world_size()}.get(group_size, group_size)
    index = distributed.rank() // size
    if min(size, world - index * size) == 1:
        if 1 < size < world:
            _groups(world, size)  # new_group is collective: the rank left over takes part
        return None
    return _groups(world, size)[index]


def convert_sync_batchnorm(
    model: _Model, group_size: int, layer: Callable[..., _BatchNorm] = GroupedSyncBatchNorm
) -> _Model:
    """Replaces every BatchNorm of `model` by a grouped SyncBatchNorm, in place; returns the model.

    Parameters and buffers are taken over, on the meta device too. With one rank per group the
    layers do not communicate, and activation checkpointing is still exact.

    Args:
        model: model with BatchNorm layers of torch.
        group_size: see `sync_group`.
        layer: makes one layer, with the arguments of `GroupedSyncBatchNorm`.

    Raises:
        ValueError: for a layer without weights, running statistics or a momentum.
    """
    group = sync_group(group_size)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, GroupedSyncBatchNorm):
                if not child.affine or not child.track_running_stats or child.momentum is None:
                    raise ValueError(f"{name}: {child} has no weights, statistics or momentum")
                norm = layer(
                    child.num_features,
                    group,
                    eps=child.eps,
                    momentum=child.momentum,
                    device="meta",
                )
                norm.weight, norm.bias = child.weight, child.bias
                for key, buffer in child.named_buffers():
                    setattr(norm, key, buffer)
                norm.train(child.training)
                setattr(parent, name, norm)
    return model


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Averages running statistics over all ranks, in place: each group saw different data.

    Call it before saving, export and evaluation, so that no group's statistics stand for all. The
    mean and the variance [C] of each layer are averaged, each rank with the same weight.
    """
    world = distributed.world_size()
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if world == 1 or not buffers:
        return
    flat = distributed.all_reduce(torch.cat([buffer.double() for buffer in buffers])) / world
    for buffer, mean in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean)
