"""Strategies `fsdp` and `hsdp`: torch's FSDP2, on all ranks or on groups of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from seer_scale import distributed
from seer_scale.distributed.work_clock import CLOCK


def build_mesh(device: torch.device, shard_size: int | None) -> DeviceMesh:
    """The ranks that parameters are sharded over: all, or groups of `shard_size` (hsdp)."""
    world = distributed.world_size()
    if shard_size is None:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (world // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
    )


def shard_units(
    model: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool,
    prefetch: int,
) -> None:
    """Shards a model on the meta device, in place: give it memory and values afterwards.

    Args:
        model: its own remaining parameters become the last unit.
        units: inner modules before outer ones.
        mesh: from `build_mesh`; with two dimensions the first one replicates.
        reshard_after_forward: free a unit after its forward pass and gather it again for the
            backward; without, it stays whole from its first use to its backward pass.
        prefetch: units to gather ahead of their use.
    """
    # Float32 for parameters and communication: precision is the forward's, BatchNorm needs no rule.
    wrapped: list[FSDPModule] = [
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward) for unit in units
    ]
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)
    for unit in [*units, model]:
        # Waiting for weights is no work of this rank's; FSDP waits in a hook between these two.
        unit.register_forward_pre_hook(_mark, prepend=True)
        unit.register_forward_pre_hook(_mark)
    for index, each in enumerate(wrapped):
        each.set_modules_to_forward_prefetch(wrapped[index + 1 : index + 1 + prefetch])
        each.set_modules_to_backward_prefetch(wrapped[max(0, index - prefetch) : index][::-1])


def _mark(*_: object) -> None:
    if CLOCK.running:
        CLOCK.mark()


def unit_parameters(model: nn.Module, units: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """The parameters that each unit holds itself, the model's own last."""
    seen: set[nn.Parameter] = set()
    parts = []
    for module in [*units, model]:
        own = [parameter for parameter in module.parameters() if parameter not in seen]
        seen.update(own)
        parts.append(own)
    return [part for part in parts if part]
