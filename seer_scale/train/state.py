"""The progress of a run, which every checkpoint's manifest holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from seer_scale.errors import CheckpointError
from seer_scale.train.collection import InUse
from seer_scale.train.spikes import WINDOW


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        step: number of steps done.
        samples_seen: position in the stream of images.
        best_loss: smallest mean loss between two checkpoints.
        collection: version of the collection in use, and the position at which its use began.
        losses: the last finite losses, oldest first; spikes are measured against them.
    """

    step: int = 0
    samples_seen: int = 0
    best_loss: float = math.inf
    collection: InUse | None = None
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, manifest: Mapping[str, Any], folder: Path) -> Self:
        """Reads the state from a checkpoint's manifest.

        Raises:
            CheckpointError: if a field is missing, unknown or out of range.
        """
        try:
            state = dict(manifest["state"])
            in_use = state.pop("collection")
            found = cls(**state, collection=in_use and InUse(**in_use))
            numbers = [found.step, found.samples_seen]
            if found.collection:
                numbers.append(found.collection.origin)
            if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
                raise ValueError(f"{numbers} should be integers >= 0")
            if type(found.best_loss) is not float or not all(map(math.isfinite, found.losses)):
                raise ValueError("losses should be numbers")
            return found
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{folder}: the manifest's state is damaged ({error})") from None

    def advance(self, images: int) -> None:
        """Counts one more step of `images` images."""
        self.step += 1
        self.samples_seen += images

    def observe(self, loss: float) -> None:
        """Remembers the finite loss of a step."""
        self.losses = [*self.losses, loss][-WINDOW:]
