"""SimCLR: crops of one image attract, all others repel (arXiv 2002.05709, section 2.1).

With more than two crops every pair of crops of an image is a positive pair and the loss is the
mean over pairs (arXiv 2004.11362, equation 2); with two it is NT-Xent.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from seer_scale.distributed import all_gather_with_gradient, world_size
from seer_scale.objectives.collapse import embedding_std


class SimCLR:
    """Contrastive loss against the embeddings of all ranks; prototypes are not used.

    Args:
        crops: crops per image.
        temperature: temperature of the cosines.
        group: ranks whose embeddings are contrasted; all unless given. Their micro-batches
            must be of one size.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self, *, crops: int = 6, temperature: float = 0.1, group: ProcessGroup | None = None
    ) -> None:
        if crops < 2:
            raise ValueError(f"crops is {crops}, but must be at least 2")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}, but must be positive")
        self.crops = crops
        self.temperature = temperature
        self.group = group

    def __call__(self, embeddings: Tensor, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this rank's micro-batch; the mean over ranks is the loss of the global batch.

        Args:
            embeddings: [crops * B, D], crop-major, unit rows.
            scores: [crops * B, K]; without influence, the prototypes get a gradient of zero.

        Returns:
            The loss, and `embedding_std` over all ranks.

        Raises:
            ValueError: if the embeddings do not divide into crops.
        """
        rows = len(embeddings)
        if embeddings.dim() != 2 or rows == 0 or rows % self.crops:
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}, but must be [crops * B, D] "
                f"with {self.crops} crops"
            )
        batch = rows // self.crops
        with torch.autocast(embeddings.device.type, enabled=False):
            own = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            everyone = all_gather_with_gradient(own, self.group)  # [ranks * crops * B, D]
            logits = own @ everyone.T / self.temperature
            row = torch.arange(rows, device=own.device)[:, None]
            first = rows * self._rank()  # where the own rows lie among everyone's
            logits = logits.scatter(1, first + row, -math.inf)  # nobody is compared with itself
            log_probabilities = F.log_softmax(logits, dim=1)
            shifts = batch * torch.arange(1, self.crops, device=own.device)
            positives = first + (row + shifts) % rows  # [crops * B, crops - 1], same image
            loss = -log_probabilities.gather(1, positives).mean()
            # A parameter without a gradient, here the prototypes, stops data-parallel training.
            loss = loss + 0 * scores.mean()
        return loss, {"embedding_std": embedding_std(embeddings, self.group)}

    def _rank(self) -> int:
        return dist.get_rank(self.group) if world_size(self.group) > 1 else 0
