"""Dynamic loss scaling for float16 (Micikevicius et al., arXiv 1710.03740, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seer_scale.errors import UserError

SMALLEST = 2.0**-14  # a gradient that overflows at this scale is not finite for another reason


@dataclass
class LossScale:
    """Scale of the loss, halved after an overflow and doubled after a long time without one.

    The constants are those of Apex O1.

    Attributes:
        value: factor of the loss before the backward pass.
        good_steps: steps since the scale last changed.
        overflowed: whether the last step was skipped; the same on every rank.
        interval: steps without an overflow after which the scale doubles.
        stepped_with: scale that the last step's gradients carry.
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
        """Returns the state to save in a checkpoint."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, Any]) -> None:
        """Continues from the state in a checkpoint."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
