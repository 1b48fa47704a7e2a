"""Strategy `fairscale`: FairScale's FullyShardedDataParallel, the engine of SEER. Alone imports it.

Its successor is `fsdp`; it is here to compare with. It needs CUDA.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from seer_scale.optim.slices import Values, fill

WRAPPERS = ("_fsdp_wrapped_module.", "_fpw_module.")  # what it puts into the names of tensors


def missing(*, cuda: bool) -> str | None:
    """Why the strategy cannot be had here, as part of a sentence; None if it can."""
    if not cuda:
        return "FairScale needs a CUDA GPU and there is none"
    if importlib.util.find_spec("fairscale") is None:
        return "FairScale is not installed (pip install 'seer-scale[fairscale]')"
    return None


def wrap_units(
    model: nn.Module,
    units: Sequence[nn.Module],
    values: Values,
    device: torch.device,
    *,
    reshard_after_forward: bool,
) -> nn.Module:
    """Gives a model on meta its values and shards it, unit by unit; returns what is to be called.

    No rank ever holds more than one unit whole, beside its own slices: of every tensor the flat
    partition of `slices.extent`, padded. Names are those of the model.

    Args:
        model: its own remaining parameters become the last unit.
        units: inner modules before outer ones.
        values: where values come from.
        device: a GPU.
        reshard_after_forward: free a unit after its forward pass and gather it again for the
            backward.
    """
    wrapper = _wrapper()
    names = {module: name for name, module in model.named_modules()}
    modules = {name: module for module, name in names.items()}
    filled: set[nn.Module] = set()
    for unit in [*units, model]:
        for module in unit.modules():
            if module in names and module not in filled:  # else: a wrapper, or done
                _fill_layer(module, values, names[module], device)
                filled.add(module)
        # Float32 for parameters and communication: precision is the forward's. Tensors are not
        # joined to one, so that each is a slice of its own.
        whole = wrapper(
            unit,
            reshard_after_forward=reshard_after_forward,
            flatten_parameters=False,
            compute_device=device,
        )
        if unit is not model:
            parent, _, child = names[unit].rpartition(".")
            setattr(modules[parent], child, whole)
    # It cleans the names of parameters by itself.
    whole.named_buffers = _cleaned(whole.named_buffers)
    return whole  # type: ignore[no-any-return]


@cache
def _wrapper() -> Any:
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    # Of torch to FairScale, on every rank: nothing a user can act on.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"fairscale")

    class Wrapper(FullyShardedDataParallel):  # type: ignore[misc]
        def _setup_output_hook_list(self) -> None:
            super()._setup_output_hook_list()
            for module in self.modules():
                if isinstance(module, FullyShardedDataParallel):
                    module._output_pre_backward_hook_registered = _Ids()

    return Wrapper


class _Ids(list[int]):
    """Where FairScale notes the id() of every output that it has put a hook on: forgets them all.

    A tensor that recomputation lets go of leaves its id to a later one, which then got no hook, on
    one rank and not on the other. A second hook on the same tensor does no harm.
    """

    def append(self, _: int) -> None:
        pass


def _fill_layer(layer: nn.Module, values: Values, name: str, device: torch.device) -> None:
    layer.to_empty(device=device, recurse=False)
    own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    prefix = f"{name}." if name else ""
    fill(layer, values, {tensor: prefix + key for key, tensor in own}, recurse=False)


def _cleaned(named_tensors: Any) -> Any:
    def cleaned(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_tensors(*args, **kwargs):
            for prefix in WRAPPERS:
                name = name.replace(prefix, "")
            yield name, tensor

    return cleaned
