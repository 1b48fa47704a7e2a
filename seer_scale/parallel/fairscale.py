"""Strategy `fairscale`: FairScale's FullyShardedDataParallel. Only this file imports fairscale.

SEER was trained with this engine; it is here for comparison. The successor in torch is the strategy
`fsdp`. FairScale needs CUDA.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from seer_scale.optim.filling import fill
from seer_scale.optim.slices import Values

WRAPPERS = ("_fsdp_wrapped_module.", "_fpw_module.")  # prefixes that FairScale adds to names


def missing(*, cuda: bool) -> str | None:
    """Reason why the strategy cannot run here, as part of a sentence; None if it can.

    Args:
        cuda: whether this machine has a GPU.
    """
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
    """Gives a model on meta its values and shards it, unit by unit; returns the module to call.

    No rank ever holds more than one whole unit beside its own slices. A slice is the padded flat
    partition of a tensor (see `slices.extent`). Tensors keep the names that they have in `model`.

    Args:
        model: model on meta; parameters that are in none of `units` become the last unit.
        units: modules to gather as one, inner modules before outer ones.
        values: where values come from.
        device: a GPU.
        reshard_after_forward: free a unit after its forward pass and gather it again for the
            backward pass.
    """
    wrapper = _wrapper()
    names = {module: name for name, module in model.named_modules()}
    modules = {name: module for module, name in names.items()}
    filled: set[nn.Module] = set()
    for unit in [*units, model]:
        for module in unit.modules():
            if module in names and module not in filled:  # else a wrapper, or filled already
                _fill_layer(module, values, names[module], device)
                filled.add(module)
        # Parameters and communication are float32; precision belongs to the forward pass. Tensors
        # are not flattened into one, so that each has a slice of its own.
        whole = wrapper(
            unit,
            reshard_after_forward=reshard_after_forward,
            flatten_parameters=False,
            compute_device=device,
        )
        if unit is not model:
            parent, _, child = names[unit].rpartition(".")
            setattr(modules[parent], child, whole)
    # FairScale itself cleans the names of parameters only.
    whole.named_buffers = _cleaned(whole.named_buffers)
    return whole  # type: ignore[no-any-return]


@cache
def _wrapper() -> Any:
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    # Warnings of torch about FairScale's code, on every rank: the user cannot act on them.
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
    """An always empty list, in place of the ids of outputs that FairScale has put a hook on.

    A tensor that recomputation frees leaves its id() to a later tensor. With FairScale's own list
    the later tensor got no hook, on one rank and not on another. A second hook on the same tensor
    does no harm.
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
