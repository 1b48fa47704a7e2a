"""Trunk, projection head and prototypes as one module with a single forward over all crops.

A single forward is what every sharding strategy wraps. Crops of one resolution are one
tensor, so BatchNorm statistics are those of a resolution, as in SwAV and SEER.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from seer_scale.models.heads import ProjectionHead, Prototypes
from seer_scale.models.on_trunk import OnTrunk
from seer_scale.models.regnet import RegNet, trunk_config


class MultiCropModel(OnTrunk):
    """The network for pretraining; independent of objectives and of other processes."""

    def __init__(self, trunk: RegNet, head: ProjectionHead, prototypes: Prototypes) -> None:
        super().__init__(trunk)
        self.head = head
        self.prototypes = prototypes

    def float32_parts(self) -> list[nn.Module]:
        """The prototypes: scores feed Sinkhorn's exponentials."""
        return [self.prototypes]

    def forward(
        self, crops: Sequence[Tensor], queue: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs the trunk over all resolutions and the head once over all crops.

        Args:
            crops: a tensor per resolution, [count * B, 3, size, size], crop-major: all images'
                first crop, then all images' second crop.
            queue: embeddings [R, D] of earlier batches, to be scored as well.

        Returns:
            embeddings [crops * B, D] with unit rows, and scores [crops * B + R, K], the queue's
            last.
        """
        features = torch.cat(self.trunk(list(crops)))  # [crops * B, C]
        embeddings = self.head(features)
        scored = embeddings if queue is None else torch.cat([embeddings, queue])
        return embeddings, self.prototypes(scored)


def build_model(
    trunk: str,
    *,
    head_dims: Sequence[int],
    head_batch_norm: bool,
    prototypes: int,
    device: torch.device | str | None = None,
) -> MultiCropModel:
    """Constructs the model without values; `initialise` or a checkpoint gives it values.

    Sharding needs the model before its values exist, so no value is drawn here.

    Args:
        trunk: key of `TRUNKS`.
        head_dims: width of every layer of the projection head.
        head_batch_norm: BatchNorm in the head's hidden layers.
        prototypes: number of prototypes K.
        device: where the tensors are made, "meta" for none; torch's default device unless given.

    Raises:
        ConfigError: if `trunk` is unknown.
    """
    config = trunk_config(trunk)
    with nullcontext() if device is None else torch.device(device):
        regnet = RegNet(config)
        head = ProjectionHead(regnet.width, head_dims, head_batch_norm)
        return MultiCropModel(regnet, head, Prototypes(head_dims[-1], prototypes))
