"""Linear heads of VISSL's linear evaluation, several of them trained side by side.

A head is a BatchNorm over the channels of one pooled map, which a plain head lacks, and a linear
layer; each head has its own learning rate. Heads share nothing, so that training them together
equals training each alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.evaluation.maps import PLAIN
from seer_scale.evaluation.sgd_state import load_state, save_state, sgd_state
from seer_scale.storage.tensor_file import Kind, TensorFile

_STATE = "state"  # key in the metadata of the safetensors file


class LinearHead(nn.Module):
    """BatchNorm2d and a linear layer: pooled map [B, channels * cells] to logits [B, classes].

    Args:
        width: channels times cells.
        cells: height and width of the pooled map in cells.
        classes: number of classes.
        plain: leave out BatchNorm.
    """

    def __init__(
        self, width: int, cells: tuple[int, int], classes: int, *, plain: bool = False
    ) -> None:
        super().__init__()
        self.shape = (width // (cells[0] * cells[1]), *cells)
        self.norm = nn.Identity() if plain else nn.BatchNorm2d(self.shape[0])
        self.linear = nn.Linear(width, classes)

    def forward(self, vectors: Tensor) -> Tensor:
        """Returns logits [B, classes] of vectors [B, width]."""
        maps = vectors.view(-1, *self.shape)
        logits: Tensor = self.linear(self.norm(maps).flatten(1))
        return logits


@dataclass(frozen=True)
class HeadKey:
    """Identity of a head: its map, maybe with `_plain`, and its learning rate per 256 images."""

    name: str
    base_lr: float

    @property
    def map(self) -> str:
        """Name of the map whose vectors the head takes."""
        return self.name.removesuffix(PLAIN)

    def __str__(self) -> str:
        return f"{self.name}@{self.base_lr:g}"


class Heads:
    """Heads and the SGD that trains them.

    Args:
        heads: heads on their device, with initial values.
        lr_scale: factor of every learning rate: global batch / 256.
        momentum: momentum of SGD.
        nesterov: whether SGD uses Nesterov's momentum.
        weight_decay: weight decay of the linear layers; BatchNorm has no weight decay.
    """

    def __init__(
        self,
        heads: Mapping[HeadKey, LinearHead],
        *,
        lr_scale: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
    ) -> None:
        self.heads = dict(heads)
        self._peaks: list[float] = []
        groups = []
        for key, head in self.heads.items():
            for module, decay in ((head.linear, weight_decay), (head.norm, 0.0)):
                groups.append({"params": list(module.parameters()), "weight_decay": decay})
                self._peaks.append(key.base_lr * lr_scale)
        self._optimizer = torch.optim.SGD(
            groups, lr=1.0, momentum=momentum, nesterov=nesterov and momentum > 0
        )

    def step(self, vectors: Mapping[str, Tensor], targets: Tensor, factor: float) -> float:
        """Takes one step of every head and returns the mean of their losses before the step.

        Args:
            vectors: pooled vectors [B, width] by map.
            targets: int64 [B].
            factor: factor of every learning rate, from the schedule.
        """
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self._optimizer.zero_grad(set_to_none=True)
        losses = [
            F.cross_entropy(head.train()(vectors[key.map]), targets)
            for key, head in self.heads.items()
        ]
        total = torch.stack(losses).sum()  # each gradient is that of its own head's loss
        total.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return float(total.detach()) / len(losses)

    @torch.inference_mode()
    def logits(self, vectors: Mapping[str, Tensor]) -> dict[HeadKey, Tensor]:
        """Returns logits [B, classes] of every head in eval mode."""
        return {key: head.eval()(vectors[key.map]) for key, head in self.heads.items()}

    def save(self, path: Path, epochs: int) -> None:
        """Writes weights, statistics and momenta in one step, and how many epochs are done."""
        save_state(path, self._tensors(), {_STATE: json.dumps({"epoch": epochs})})

    def load(self, path: Path) -> int:
        """Restores what `save` wrote and returns its epochs; 0 if there is no undamaged file."""
        if not path.is_file():
            return 0
        try:
            file = TensorFile(path)
            epochs = int(json.loads(file.metadata[_STATE])["epoch"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        tensors = self._tensors()
        if {name: Kind.of(tensor) for name, tensor in tensors.items()} != {
            name: entry.kind for name, entry in file.entries.items()
        }:
            return 0
        load_state(file, tensors)
        return epochs

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for key, head in self.heads.items():
            names = {"weights": f"{key}/", "momenta": f"momentum/{key}/"}
            tensors |= sgd_state(head, self._optimizer, **names)
        return tensors


def build_head(
    key: HeadKey, width: int, cells: tuple[int, int], classes: int, seed: int
) -> LinearHead:
    """Builds a head whose initial values depend on the seed and the map alone.

    They are uniform within 1 / sqrt(width), as torch's are by default, and so VISSL's.

    Args:
        key: identity of the head.
        width: channels times cells.
        cells: height and width of the pooled map in cells.
        classes: number of classes.
        seed: seed of the initial values.
    """
    head = LinearHead(width, cells, classes, plain=key.name != key.map)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(key.map.encode()))
    for parameter in head.linear.parameters():
        nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
    return head
