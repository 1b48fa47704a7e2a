"""Embeddings of earlier batches, so that small batches still fill the prototypes (SwAV, 5.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class EmbeddingQueue:
    """The newest `length` embeddings of every assign crop on this rank.

    Args:
        length: embeddings kept per assign crop.
        start: calls of `push` before which the queue is not offered, even when full.
    """

    def __init__(self, length: int, start: int) -> None:
        self.length = length
        self.start = start
        self._pushes = 0
        self._kept: Tensor | None = None  # [assign_crops, <= length, D], newest first

    @property
    def rows(self) -> Tensor | None:
        """[assign_crops * length, D], crop-major; None until the queue is full and started."""
        kept = self._kept
        if kept is None or kept.shape[1] < self.length or self._pushes < self.start:
            return None
        return kept.flatten(0, 1)

    def push(self, embeddings: Tensor) -> None:
        """Puts embeddings [assign_crops, B, D] in front; the oldest beyond `length` leave."""
        newest = embeddings.detach()
        if self._kept is not None:
            newest = torch.cat([newest, self._kept], dim=1)
        self._kept = newest[:, : self.length].clone()
        self._pushes += 1

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's embeddings and the number of pushes, as tensors."""
        state = {"queue_pushes": torch.tensor(self._pushes)}
        if self._kept is not None:
            state["queue"] = self._kept
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a state, on the device where its tensors are.

        A longer queue than this one is cut to its newest embeddings, a shorter one fills up.
        """
        self._pushes = int(state["queue_pushes"])
        kept = state.get("queue")
        self._kept = None if kept is None else kept[:, : self.length].clone()
