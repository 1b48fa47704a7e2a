"""Projection head and prototypes on a trunk (SwAV, arXiv 2006.09882, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionHead(nn.Module):
    """An MLP to the unit sphere: features [N, in_dim] to embeddings [N, dims[-1]].

    Args:
        in_dim: width of the trunk.
        dims: width of every layer, e.g. (8192, 8192, 256) in SEER.
        batch_norm: BatchNorm after every layer but the last; SwAV has it, SEER does not.
    """

    def __init__(self, in_dim: int, dims: Sequence[int], batch_norm: bool) -> None:
        super().__init__()
        *hidden, out_dim = dims
        layers: list[nn.Module] = []
        for dim in hidden:
            layers.append(nn.Linear(in_dim, dim))
            if batch_norm:
                layers.append(nn.BatchNorm1d(dim))
            layers.append(nn.ReLU(inplace=True))
            in_dim = dim
        layers.append(nn.Linear(in_dim, out_dim))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings [N, D] with rows of unit L2 norm, in float32 or wider."""
        projected = self.layers(features)
        # Unit norm in bfloat16 would be good to two digits only.
        wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return F.normalize(wide, dim=1)


class Prototypes(nn.Module):
    """K cluster centres: scores are dot products with `weight` [K, D], without a bias.

    The weight and the scores stay float32 under autocast: the scores feed an exponential, and
    rounded prototypes are known to spoil convergence. The optimizer renormalises the rows after
    each step.

    Args:
        dim: width D of the embeddings.
        count: number of prototypes K.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.dim = dim
        self.count = count
        self.weight = nn.Parameter(torch.empty(count, dim))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores [N, K] of embeddings [N, D]."""
        device = embeddings.device.type
        # Autocast does not exist on the meta device, where shapes and operations are counted.
        available = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if available else nullcontext():
            return F.linear(embeddings.to(self.weight.dtype), self.weight)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"dim={self.dim}, count={self.count}"
