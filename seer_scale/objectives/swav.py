"""SwAV: predicts one crop's code from the scores of the others (arXiv 2006.09882, section 3).

SEER uses the same objective. Codes are balanced over one micro-batch of all ranks, plus the queue
if there is one; gradient accumulation does not enlarge that batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from seer_scale.distributed import world_size
from seer_scale.objectives.collapse import embedding_std, usage_entropy
from seer_scale.objectives.queue import EmbeddingQueue, reshard_queue
from seer_scale.objectives.sinkhorn import SMALLEST_EPSILON, sinkhorn_knopp


class SwAV:
    """Swapped prediction with balanced codes.

    Args:
        crops: crops per image.
        temperature: temperature of the predictions; a smaller one makes them sharper.
        epsilon: entropy weight of the codes; a smaller one makes them harder. RG-10B has 0.03.
        sinkhorn_iterations: iterations that balance the codes; SwAV has 3, SEER 10.
        assign_crops: numbers of the crops that give codes: those of high resolution.
        queue_length: earlier embeddings per assign crop and over all ranks that are balanced
            together with the batch; 0 for none. Sensible where the batch is smaller than the
            number of prototypes.
        queue_start_steps: calls (micro-batches) before the queue is used. Embeddings age quickly
            early on, and a queue of stale ones stops progress.
        group: ranks whose samples are balanced together; all unless given.

    Raises:
        ValueError: if a number is out of range, or the queue does not divide over the ranks.
    """

    def __init__(
        self,
        *,
        crops: int = 6,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        assign_crops: tuple[int, ...] = (0, 1),
        queue_length: int = 0,
        queue_start_steps: int = 0,
        group: ProcessGroup | None = None,
    ) -> None:
        if crops < 2:
            raise ValueError(f"crops is {crops}, but must be at least 2")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}, but must be positive")
        if not SMALLEST_EPSILON <= epsilon < math.inf:
            raise ValueError(f"epsilon is {epsilon}, but must be positive as a float32")
        if sinkhorn_iterations < 1:
            raise ValueError(f"sinkhorn_iterations is {sinkhorn_iterations}, but must be positive")
        distinct = set(assign_crops)
        if not distinct or len(distinct) < len(assign_crops) or not distinct <= set(range(crops)):
            raise ValueError(
                f"assign_crops is {list(assign_crops)}, but must hold different crops "
                f"from 0 to {crops - 1}"
            )
        ranks = world_size(group)
        if queue_length < 0 or queue_length % ranks:
            raise ValueError(
                f"queue_length is {queue_length}, but must be 0 or more and a multiple of the "
                f"number of ranks, {ranks}"
            )
        if queue_start_steps < 0:
            raise ValueError(f"queue_start_steps is {queue_start_steps}, but must be 0 or more")
        self.crops = crops
        self.temperature = temperature
        self.epsilon = epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        self.assign_crops = tuple(assign_crops)
        self.group = group
        self._queue = (
            EmbeddingQueue(queue_length // ranks, queue_start_steps) if queue_length else None
        )

    @property
    def queue(self) -> Tensor | None:
        """Embeddings [R, D] whose scores the next call expects as extra rows, or None."""
        return None if self._queue is None else self._queue.rows

    def __call__(self, embeddings: Tensor, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this rank's micro-batch; the mean over ranks is the loss of the global batch.

        Args:
            embeddings: [crops * B, D], crop-major, unit rows.
            scores: [crops * B + R, K], those of `queue` last.

        Returns:
            The mean cross-entropy, and metrics that tell a collapse: `loss_over_ln_k` (this
            rank's; 1 for guessing), and over all ranks `prototype_usage_entropy` and
            `embedding_std`.

        Raises:
            ValueError: if the shapes do not fit.
        """
        batch = self._batch_size(embeddings, scores)
        with torch.autocast(scores.device.type, enabled=False):
            wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
            current = wide[: len(embeddings)].reshape(self.crops, batch, -1)  # [crops, B, K]
            queued = wide[len(embeddings) :].tensor_split(len(self.assign_crops))  # each [L, K]
            log_probabilities = F.log_softmax(current / self.temperature, dim=-1)
            balanced = [
                torch.cat([current[crop], its_queue])
                for crop, its_queue in zip(self.assign_crops, queued, strict=True)
            ]
            codes = sinkhorn_knopp(  # of all crops in one go: they share the collectives
                torch.stack(balanced),
                epsilon=self.epsilon,
                iterations=self.sinkhorn_iterations,
                group=self.group,
            )[:, :batch]
            losses = []
            for crop, code in zip(self.assign_crops, codes, strict=True):
                # Not by a list of indices, which the host would have to bring to the device.
                others = torch.cat([log_probabilities[:crop], log_probabilities[crop + 1 :]])
                losses.append(-(code * others).sum(dim=-1).mean())
            loss = torch.stack(losses).mean()
            metrics = {
                "loss_over_ln_k": loss.detach() / math.log(scores.shape[1]),
                "prototype_usage_entropy": usage_entropy(codes.flatten(0, 1), self.group),
                "embedding_std": embedding_std(embeddings, self.group),
            }
        if self._queue is not None:
            by_crop = embeddings.reshape(self.crops, batch, -1)
            self._queue.push(torch.stack([by_crop[crop] for crop in self.assign_crops]))
        return loss, metrics

    def _batch_size(self, embeddings: Tensor, scores: Tensor) -> int:
        rows = len(embeddings)
        if embeddings.dim() != 2 or rows == 0 or rows % self.crops:
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}, but must be [crops * B, D] "
                f"with {self.crops} crops"
            )
        queued = 0 if self.queue is None else len(self.queue)
        if scores.dim() != 2 or len(scores) != rows + queued:
            raise ValueError(
                f"scores have shape {tuple(scores.shape)}, but must have {rows} rows for the "
                f"crops and {queued} for the queue"
            )
        return rows // self.crops

    def state_dict(self) -> dict[str, Tensor]:
        """The queue of this rank; each rank has its own queue."""
        return {} if self._queue is None else self._queue.state_dict()

    def reshard(
        self, states: Sequence[Mapping[str, Tensor]], rank: int, world_size: int
    ) -> dict[str, Tensor]:
        """Computes one rank's state from the states that another number of ranks saved."""
        return reshard_queue(states, rank, world_size) if states[0] else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the queue from `state_dict`; the queue starts empty if the state has none."""
        if self._queue is not None and state:
            self._queue.load_state_dict(state)
