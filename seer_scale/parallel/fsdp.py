"""Strategies `fsdp` and `hsdp`: torch's FSDP2, over all ranks or within groups of ranks.

Zhao et al. (arXiv 2304.11277) describe the method; FSDP2 (`fully_shard`) shards each parameter by
its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from seer_scale import distributed
from seer_scale.distributed.work_clock import CLOCK


def build_mesh(device: torch.device, shard_size: int | None) -> DeviceMesh:
    """Creates the mesh of ranks that parameters are sharded over.

    Args:
        device: device of this rank.
        shard_size: ranks that share one copy of the model (hsdp); None for all ranks.

    Returns:
        a mesh with the dimension `shard`, for hsdp behind a dimension `replicate`.
    """
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
    low: torch.dtype | None = None,
    low_layers: Collection[nn.Module] = (),
) -> None:
    """Shards a model on the meta device, in place; the caller then gives it memory and values.

    Args:
        model: model on meta; parameters that are in none of `units` become the last unit.
        units: modules to gather as one, inner modules before outer ones.
        mesh: from `build_mesh`; with two dimensions the first one replicates.
        reshard_after_forward: free a unit after its forward pass and gather it again for the
            backward pass; otherwise the unit stays whole from its first use to its backward pass.
        prefetch: number of units to gather ahead of their use.
        low: type in which the weights of `low_layers` are gathered; None for the type they have.
            All other weights, all slices and all gradients are float32.
        low_layers: layers whose forward pass casts its weights to `low`.
    """
    policy = _policy(low)
    wrapped: list[FSDPModule] = []
    for unit in [*units, model]:
        whole = fully_shard(
            unit, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy
        )
        if unit is not model:
            wrapped.append(whole)
        if low is not None:
            _keep_float32(whole, low_layers)
            _Float32Gradients(unit)
        # FSDP waits for weights in a hook between these two: the work clock leaves that time out.
        unit.register_forward_pre_hook(_mark, prepend=True)
        unit.register_forward_pre_hook(_mark)
    for index, each in enumerate(wrapped):
        each.set_modules_to_forward_prefetch(wrapped[index + 1 : index + 1 + prefetch])
        each.set_modules_to_backward_prefetch(wrapped[max(0, index - prefetch) : index][::-1])


def _policy(low: torch.dtype | None) -> MixedPrecisionPolicy:
    """Gathers in `low` and reduces in float32; inputs are cast by the forward pass itself."""
    reduced = None if low is None else torch.float32
    return MixedPrecisionPolicy(low, reduced, cast_forward_inputs=False)


def _keep_float32(unit: FSDPModule, low_layers: Collection[nn.Module]) -> None:
    """Makes a unit gather in float32, within the same collective, what is not in `low_layers`.

    torch has a type per unit. BatchNorm's few numbers as units of their own would double the number
    of collectives, and be gathered and reduced once per resolution.
    """
    group = unit._get_fsdp_state()._fsdp_param_group  # None if units inside have all parameters
    for own in group.fsdp_params if group else ():
        if own._module_info.module not in low_layers:
            own.init_dtype_attrs = partial(_init_as, own.init_dtype_attrs)  # type: ignore[method-assign]


def _init_as(init: Callable[[MixedPrecisionPolicy], None], policy: MixedPrecisionPolicy) -> None:
    init(replace(policy, param_dtype=None))


class _Float32Gradients:
    """Lets the gathered 16-bit weights of a unit have float32 gradients.

    Autograd then casts the gradient of each use before it adds them up, as it does behind a cast of
    a float32 weight: the gradients of two resolutions are added in float32.
    """

    def __init__(self, unit: nn.Module) -> None:
        # Behind the hook in which FSDP puts the gathered weights, always the same, into the unit.
        self._hook = unit.register_forward_pre_hook(self._set)

    def _set(self, unit: nn.Module, _: object) -> None:
        for parameter in unit.parameters():
            if not isinstance(parameter, DTensor):  # of a unit inside, which has its own hook
                parameter.grad_dtype = torch.float32
        self._hook.remove()


def _mark(*_: object) -> None:
    if CLOCK.running:
        CLOCK.mark()


def unit_parameters(model: nn.Module, units: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """Lists the parameters of each unit, those in no unit last; empty lists are left out."""
    seen: set[nn.Parameter] = set()
    parts = []
    for module in [*units, model]:
        own = [parameter for parameter in module.parameters() if parameter not in seen]
        seen.update(own)
        parts.append(own)
    return [part for part in parts if part]
