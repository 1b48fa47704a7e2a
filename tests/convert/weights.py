"""Random weights for the converter's tests: a trunk with statistics that are no defaults."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from seer_scale.models import build_trunk
from seer_scale.models.regnet import RegNet

M = TypeVar("M", bound=nn.Module)


def randomised(module: M, seed: int = 0) -> M:
    """Every tensor random, of a size that keeps features finite through dozens of blocks."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(int(torch.randint(1, 10**6, (), generator=random)))
            elif name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5, generator=random)
            elif tensor.ndim == 1:
                tensor.normal_(0, 0.1, generator=random)
            else:
                fan_in = tensor[0].numel()
                tensor.normal_(0, fan_in**-0.5, generator=random)
    return module


def random_trunk(name: str, seed: int = 0) -> RegNet:
    return randomised(build_trunk(name, device="meta").to_empty(device="cpu"), seed)


def write_source(name: str, path: Path, seed: int = 0) -> dict[str, Tensor]:
    """A file of our names whose metadata names the trunk."""
    state = random_trunk(name, seed).state_dict()
    save_file(state, path, metadata={"trunk": name})
    return state


def images(batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
