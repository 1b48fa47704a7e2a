"""A trunk that is never whole in a process: each layer is read right before its forward pass.

All ranks of a node read one file, which the system keeps in memory once, as its cache. A rank holds
one layer. A trunk of ten billion parameters takes 35 GiB, which no GPU has left beside a training.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seer_scale.errors import CheckpointError
from seer_scale.models import build_trunk
from seer_scale.serving import CONFIG, WEIGHTS, read_config
from seer_scale.storage.tensor_file import Kind, TensorFile


def open_layerwise(folder: Path, device: torch.device) -> nn.Module:
    """Opens an exported trunk in eval mode: images [B, 3, H, W] -> features [B, C].

    The features equal those of `load_trunk`. Every forward pass reads the whole file once.

    Args:
        folder: as `export_trunk` writes it.
        device: where the layers compute.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are another model's.
    """
    trunk = build_trunk(str(read_config(folder)["trunk"]), device="meta").eval()
    path = folder / WEIGHTS
    try:
        file = TensorFile(path)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); export the trunk again") from None
    expected = {name: Kind.of(tensor) for name, tensor in trunk.state_dict().items()}
    if {name: entry.kind for name, entry in file.entries.items()} != expected:
        raise CheckpointError(f"the tensors of {path} are not those of its {CONFIG}")
    for name, layer in trunk.named_modules():
        prefix = f"{name}." if name else ""
        if any(True for _ in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))):
            layer.register_forward_pre_hook(partial(_read, file, prefix, device))
            layer.register_forward_hook(partial(_forget, _tensors(layer)))
    return trunk


def _tensors(layer: nn.Module) -> dict[str, Tensor | None]:
    return {**layer._parameters, **layer._buffers}


def _read(file: TensorFile, prefix: str, device: torch.device, layer: nn.Module, _: Any) -> None:
    """Gives a layer its tensors."""
    for name, tensor in _tensors(layer).items():
        if tensor is not None:
            _put(layer, name, file.whole(prefix + name).to(device))


def _forget(empty: dict[str, Tensor | None], layer: nn.Module, *_: Any) -> None:
    """Frees a layer's tensors."""
    for name, tensor in empty.items():
        if tensor is not None:
            _put(layer, name, tensor)


def _put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    if name in layer._buffers:
        layer._buffers[name] = tensor
    else:
        layer._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
