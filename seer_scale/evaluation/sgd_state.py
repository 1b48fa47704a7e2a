"""Weights of a module and the momenta of its SGD as one safetensors file, to resume from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from seer_scale.storage.atomic import replaced_file
from seer_scale.storage.tensor_file import Kind, TensorFile, write_tensors


def sgd_state(
    module: nn.Module, optimizer: torch.optim.SGD, *, weights: str, momenta: str
) -> dict[str, Tensor]:
    """Returns the live tensors of a module and their momenta, by the names they have in the file.

    A momentum that SGD has not made yet is created as zeros, from which SGD takes the same step.

    Args:
        module: module whose trained parameters belong to `optimizer`.
        optimizer: optimizer of these parameters.
        weights: prefix of parameters and buffers.
        momenta: prefix of momenta.
    """
    tensors = {f"{weights}{name}": tensor for name, tensor in module.state_dict().items()}
    trained = {
        id(parameter)
        for group in optimizer.param_groups
        if group["momentum"]
        for parameter in group["params"]
    }
    for name, parameter in module.named_parameters():
        if id(parameter) in trained:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            tensors[f"{momenta}{name}"] = state["momentum_buffer"]
    return tensors


def save_state(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Writes tensors, and a few texts beside them, in one step.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    with replaced_file(path) as fresh:
        write_tensors(
            fresh,
            {name: Kind.of(tensor) for name, tensor in tensors.items()},
            lambda name: tensors[name].detach().cpu().contiguous(),
            about,
        )


@torch.no_grad()
def load_state(file: TensorFile, tensors: Mapping[str, Tensor]) -> None:
    """Copies the tensors of a file into the live tensors of the same names.

    Raises:
        KeyError: the file lacks a tensor.
        OSError: the file cannot be read.
    """
    for name, tensor in tensors.items():
        tensor.copy_(file.whole(name))
