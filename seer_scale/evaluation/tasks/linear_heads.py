"""Linear heads as VISSL's linear evaluation has them, several trained side by side.

Each head is a BatchNorm over the channels of one pooled map and a linear layer, with a learning
rate of its own. Heads share nothing, so training them together equals training each alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from seer_scale.storage.tensor_file import Kind, write_tensors

_STATE = "state"  # of the safetensors file's metadata


class LinearHead(nn.Module):
    """Pooled map [B, channels * cells] to logits [B, classes]: BatchNorm2d, then a linear layer.

    Args:
        width: channels times cells.
        cells: (height, width) of the pooled map.
        classes: how many.
    """

    def __init__(self, width: int, cells: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.cells = cells
        self.norm = nn.BatchNorm2d(width // (cells[0] * cells[1]))
        self.linear = nn.Linear(width, classes)

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits [B, classes]."""
        maps = vectors.view(-1, self.norm.num_features, *self.cells)
        logits: Tensor = self.linear(self.norm(maps).flatten(1))
        return logits


@dataclass(frozen=True)
class HeadKey:
    """Which head: the map it looks at and its learning rate per 256 images."""

    map: str
    base_lr: float

    def __str__(self) -> str:
        return f"{self.map}@{self.base_lr:g}"


class Heads:
    """Heads and the SGD that trains them.

    Args:
        heads: on their device, with initial values.
        lr_scale: global batch / 256, which every learning rate is multiplied by.
        momentum: of SGD.
        nesterov: its kind of momentum.
        weight_decay: of the linear layers; BatchNorm has none.
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
        """One step of every head on a batch; the mean of their losses before it.

        Args:
            vectors: of every map, [B, width].
            targets: [B].
            factor: of every learning rate, by the schedule.
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
        """Of every head in eval mode."""
        return {key: head.eval()(vectors[key.map]) for key, head in self.heads.items()}

    def save(self, path: Path, state: Mapping[str, int | str]) -> None:
        """Writes weights, statistics and momenta in one step, with a few values beside them."""
        fresh = path.with_name(f"{path.name}.writing")
        tensors = self._tensors()
        write_tensors(
            fresh,
            {name: Kind.of(tensor) for name, tensor in tensors.items()},
            tensors.__getitem__,
            {_STATE: json.dumps(dict(state))},
        )
        os.replace(fresh, path)

    def load(self, path: Path) -> dict[str, int | str]:
        """Takes over what `save` wrote and returns its values; {} if there is no sound file."""
        if not path.is_file():
            return {}
        try:
            with safe_open(path, framework="pt") as file:
                state: dict[str, int | str] = json.loads(file.metadata()[_STATE])
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return {}
        own = self._tensors()
        momenta = {name for name in saved if name.startswith("momentum/")}
        if saved.keys() - momenta != {n for n in own if not n.startswith("momentum/")}:
            return {}
        with torch.no_grad():
            for key, head in self.heads.items():
                for name, tensor in head.state_dict().items():
                    tensor.copy_(saved[f"{key}/{name}"])
                for name, parameter in head.named_parameters():
                    if (momentum := saved.get(f"momentum/{key}/{name}")) is not None:
                        self._optimizer.state[parameter]["momentum_buffer"] = momentum.to(
                            parameter.device
                        )
        return state

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for key, head in self.heads.items():
            for name, tensor in head.state_dict().items():
                tensors[f"{key}/{name}"] = tensor.detach().cpu().contiguous()
            for name, parameter in head.named_parameters():
                momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
                if momentum is not None:
                    tensors[f"momentum/{key}/{name}"] = momentum.cpu().contiguous()
        return tensors


def build_head(
    key: HeadKey, width: int, cells: tuple[int, int], classes: int, seed: int
) -> LinearHead:
    """A head with initial values that hang on the seed and the map alone.

    Linear weights are drawn from a normal distribution of standard deviation 0.01, biases are 0.
    """
    head = LinearHead(width, cells, classes)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(key.map.encode()))
    with torch.no_grad():
        head.linear.weight.normal_(0.0, 0.01, generator=generator)
        head.linear.bias.zero_()
    return head
