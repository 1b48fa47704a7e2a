"""Calls of each layer under ZeRO 3, added up over the resolutions that pass through the layer.

Stage 3 frees a layer when its inputs have got as many gradients as the layer had calls. But
DeepSpeed counts calls from zero at every call. A layer that two resolutions pass through would be
freed after the backward pass of the first, gathered again for the second, and stay whole until the
end, so that every rank would hold the whole model.
"""

from __future__ import annotations

import torch
from torch import nn


def add_up_calls(model: nn.Module) -> None:
    """Makes every layer of a partitioned model count the calls of all resolutions."""
    for module in model.modules():
        module.register_forward_pre_hook(_remember_calls, prepend=True)
        module.register_forward_pre_hook(_add_calls)


def forget_calls(model: nn.Module) -> None:
    """Starts the counts again: a forward pass without a backward pass leaves calls behind."""
    for module in model.modules():
        vars(module)["ds_grads_remaining"] = 0


def _remember_calls(module: nn.Module, _: object) -> None:
    own = vars(module)
    own["_calls_before"] = own.get("ds_grads_remaining", 0)


def _add_calls(module: nn.Module, _: object) -> None:
    own = vars(module)
    if torch._C._current_graph_task_id() != -1:  # in a recomputation, which gets no gradient
        own["ds_grads_remaining"] = 0
    own["ds_grads_remaining"] += own["_calls_before"]
