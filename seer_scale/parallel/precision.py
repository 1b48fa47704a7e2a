"""Precision is a property of the forward pass: weights, state, BatchNorm and loss stay float32.

One autocast inside the model's forward serves every strategy. DeepSpeed's own sections are not
used: `bf16` and `fp16` cast BatchNorm, and `torch_autocast` decides about loss scaling by itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seer_scale.errors import UserError

AUTOCAST = {"bf16": torch.bfloat16, "amp-o1": torch.float16}
SCALED = frozenset({"amp-o1", "apex-o1"})  # float16: its gradients need a loss scale
SMALLEST = 2.0**-14  # a loss that overflows even so is not finite for another reason


def apply_autocast(model: nn.Module, precision: str, device: torch.device) -> None:
    """Runs the forward pass of `model` under autocast, where `precision` asks for it, in place.

    Args:
        model: its float32 regions (prototypes, norms) switch autocast off themselves.
        precision: of `train.precision`; `fp32` leaves the model as it is, and so does `apex-o1`,
            which is `apex.apply_o1`'s.
        device: where the training runs.
    """
    if precision not in AUTOCAST:
        return
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # The cache would keep a copy of every weight until the pass ends: under sharding that is
        # the whole model on every rank.
        with torch.autocast(device.type, AUTOCAST[precision], cache_enabled=False):
            return inner(*args, **kwargs)

    model.forward = forward


@dataclass
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2; constants of Apex O1).

    Attributes:
        value: what the loss is multiplied by before the backward pass.
        good_steps: steps since it last changed.
        overflowed: whether the last step was skipped; the same on every rank.
        stepped_with: the scale that the last step's gradients carry.
    """

    value: float = 2.0**16
    good_steps: int = 0
    overflowed: bool = False
    interval: int = 2000
    stepped_with: float = 1.0

    def update(self, overflow: bool) -> None:
        """Halves the scale after an overflow, doubles it after `interval` steps without one.

        Raises:
            UserError: if gradients overflow at the smallest scale too.
        """
        self.overflowed, self.stepped_with = overflow, self.value
        if overflow:
            self.value, self.good_steps = self.value / 2, 0
            if self.value < SMALLEST:
                raise UserError(
                    f"the gradient is not finite even at a loss scale of {self.value}: the run "
                    "stops, its checkpoints stay; try a lower optim.lr or optim.base_lr, or "
                    "train.precision=bf16"
                )
            return
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.value, self.good_steps = min(self.value * 2, 2.0**24), 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's state."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
