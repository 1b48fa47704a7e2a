"""Queue of embeddings of earlier batches, for small batches (SwAV, section 5.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class EmbeddingQueue:
    """The newest `length` embeddings of every assign crop on this rank.

    Args:
        length: embeddings kept per assign crop.
        start: number of calls of `push` before the queue is used, even if full earlier.
    """

    def __init__(self, length: int, start: int) -> None:
        self.length = length
        self.start = start
        self._pushes = 0
        self._batch = 0  # rows of a push
        self._kept: Tensor | None = None  # [assign_crops, <= length, D], newest first

    @property
    def rows(self) -> Tensor | None:
        """Embeddings [assign_crops * length, D], crop-major; None until full and started."""
        kept = self._kept
        if kept is None or kept.shape[1] < self.length or self._pushes < self.start:
            return None
        return kept.flatten(0, 1)

    def push(self, embeddings: Tensor) -> None:
        """Adds embeddings [assign_crops, B, D] in front; drops the oldest beyond `length`."""
        newest = embeddings.detach()
        if self._kept is not None:
            newest = torch.cat([newest, self._kept], dim=1)
        self._kept = newest[:, : self.length].clone()
        self._pushes += 1
        self._batch = embeddings.shape[1]

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's embeddings, the number of pushes and the rows per push, as tensors."""
        state = {
            "queue_pushes": torch.tensor(self._pushes),
            "queue_batch": torch.tensor(self._batch),
        }
        if self._kept is not None:
            state["queue"] = self._kept
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a state, on the device of its tensors.

        A longer queue than this one is cut to its newest embeddings, a shorter one fills up.
        """
        self._pushes, self._batch = int(state["queue_pushes"]), int(state["queue_batch"])
        kept = state.get("queue")
        self._kept = None if kept is None else kept[:, : self.length].clone()


def reshard_queue(
    states: Sequence[Mapping[str, Tensor]], rank: int, world_size: int
) -> dict[str, Tensor]:
    """Distributes saved queues over another number of ranks; returns the part of `rank`.

    The queues together are one, ordered by push, newest first, and within a push by rank: the
    order of the samples. Every `world_size`-th of its rows goes to a rank, so that each push is
    spread over all ranks and leaves the queue everywhere at the same time.

    Args:
        states: `EmbeddingQueue.state_dict` of every rank that saved, in rank order.
        rank: number of the rank that loads.
        world_size: ranks that load.
    """
    state = dict(states[0])
    batch = int(state["queue_batch"])
    state["queue_batch"] = torch.tensor(max(1, batch * len(states) // world_size))
    if batch and all("queue" in other for other in states):
        by_rank = [torch.split(other["queue"], batch, dim=1) for other in states]
        pushes = [part for push in zip(*by_rank, strict=True) for part in push]
        whole = torch.cat(pushes, dim=1)  # [assign_crops, all rows, D]
        rows = whole.shape[1] // world_size  # as many on every rank
        state["queue"] = whole[:, rank::world_size][:, :rows].contiguous()
    return state
