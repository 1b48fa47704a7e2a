"""A trunk with a linear classifier, for fine-tuning (SEER, arXiv 2103.01988, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seer_scale.models.on_trunk import OnTrunk
from seer_scale.models.regnet import RegNet, trunk_config


class Classifier(OnTrunk):
    """Computes logits from pooled features, with the call of `MultiCropModel`: engines take both.

    Args:
        trunk: may be on the meta device.
        classes: number of classes N.
        freeze: number of first stages that keep their BatchNorm in eval mode, as the stem then
            does. The optimizer keeps the weights of these stages fixed.
    """

    def __init__(self, trunk: RegNet, classes: int, freeze: int = 0) -> None:
        super().__init__(trunk)
        self.head = nn.Linear(trunk.width, classes)
        self.freeze = freeze

    def forward(
        self, images: Sequence[Tensor], queue: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns features [B, C] and logits [B, N], in float32 or wider, of images [B, 3, H, W].

        Args:
            images: a list of one tensor.
            queue: ignored; engines pass one.
        """
        (batch,) = images
        features = self.trunk(batch)
        logits = self.head(features)
        return features, logits.to(torch.promote_types(logits.dtype, torch.float32))

    def train(self, mode: bool = True) -> Classifier:
        """Sets training mode, except for frozen stages."""
        super().train(mode)
        if self.freeze:
            for frozen in [self.trunk.stem, *self.trunk.stages()[: self.freeze]]:
                frozen.eval()
        return self

    def frozen(self) -> frozenset[str]:
        """Names of the parameters that do not train."""
        stages = list(self.trunk.trunk_output._modules)[: self.freeze]
        prefixes = ("trunk.stem.", *(f"trunk.trunk_output.{stage}." for stage in stages))
        names = [name for name, _ in self.named_parameters()] if self.freeze else []
        return frozenset(name for name in names if name.startswith(prefixes))


def build_classifier(
    trunk: str, *, classes: int, freeze: int = 0, device: torch.device | str = "meta"
) -> Classifier:
    """Constructs a classifier without values.

    Raises:
        ConfigError: if `trunk` is unknown.
    """
    config = trunk_config(trunk)
    with torch.device(device):
        return Classifier(RegNet(config), classes, freeze)
