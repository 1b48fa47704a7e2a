"""Contenders of `make bench`: SwAV as a plain loop on torchvision, and with lightly's modules.

Each is written as a careful user of these libraries would write it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.regnet import BlockParams, RegNet

from seer_scale.models import TRUNKS, MultiCropModel

TEMPERATURE, EPSILON, ITERATIONS = 0.1, 0.05, 3
LR, MOMENTUM, WEIGHT_DECAY, TRUST = 0.01, 0.9, 1e-5, 1e-3
# A step on crops, one tensor [count * B, 3, size, size] per resolution; returns the loss.
Step = Callable[[Sequence[Tensor]], Tensor]


def torchvision_trunk(model: MultiCropModel, name: str) -> nn.Module:
    """Builds torchvision's RegNet with the model's weights; its output are pooled features."""
    stages = TRUNKS[name].stages
    sizes = BlockParams(
        depths=[stage.depth for stage in stages],
        widths=[stage.width for stage in stages],
        group_widths=[stage.group_width for stage in stages],
        bottleneck_multipliers=[1.0] * len(stages),
        strides=[2] * len(stages),
        se_ratio=TRUNKS[name].se_ratio,
    )
    trunk = RegNet(sizes, stem_width=TRUNKS[name].stem_width)
    trunk.fc = nn.Identity()
    trunk.load_state_dict(model.trunk.state_dict())
    return trunk  # type: ignore[no-any-return]


class PlainModel(nn.Module):
    """SwAV's network by its authors' code: crops of one size together, one pass of the head."""

    def __init__(self, model: MultiCropModel, name: str) -> None:
        super().__init__()
        self.trunk = torchvision_trunk(model, name)
        self.head = nn.Sequential(
            *[
                nn.Linear(layer.in_features, layer.out_features)
                if isinstance(layer, nn.Linear)
                else nn.ReLU(inplace=True)
                for layer in model.head.layers
            ]
        )
        self.head.load_state_dict(model.head.layers.state_dict())
        self.prototypes = nn.Linear(model.prototypes.dim, model.prototypes.count, bias=False)
        self.prototypes.load_state_dict(model.prototypes.state_dict())

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Scores [crops * B, K]."""
        features = torch.cat([self.trunk(resolution) for resolution in crops])
        scores: Tensor = self.prototypes(F.normalize(self.head(features), dim=1))
        return scores


@torch.no_grad()
def plain_sinkhorn(scores: Tensor) -> Tensor:
    """Computes codes [B, K] of scores [B, K] on exponentials, as SwAV's published code does."""
    codes = torch.exp(scores / EPSILON).t()  # [K, B]
    world = dist.get_world_size()
    prototypes, samples = codes.shape[0], codes.shape[1] * world
    total = codes.sum()
    dist.all_reduce(total)
    codes /= total
    for _ in range(ITERATIONS):
        rows = codes.sum(dim=1, keepdim=True)
        dist.all_reduce(rows)
        codes /= rows
        codes /= prototypes
        codes /= codes.sum(dim=0, keepdim=True)
        codes /= samples
    balanced: Tensor = (codes * samples).t()
    return balanced


def plain_step(
    model: MultiCropModel, name: str, *, crops: int, autocast: bool = False
) -> tuple[Step, DistributedDataParallel]:
    """Builds the plain step: torchvision's RegNet, DDP, autocast, SwAV's loss, LARC by tensor."""
    device = next(model.parameters()).device
    own = PlainModel(model, name).to(device).train()
    wrapped = DistributedDataParallel(own, device_ids=[device] if device.type == "cuda" else None)
    parameters = list(own.parameters())
    optimizer = torch.optim.SGD(parameters, LR, MOMENTUM)

    def step(images: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            own.prototypes.weight.copy_(F.normalize(own.prototypes.weight, dim=1))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            scores = wrapped(images)
        by_crop = scores.float().chunk(crops)
        loss: Tensor = scores.new_zeros((), dtype=torch.float32)
        for assigned in range(2):
            code = plain_sinkhorn(by_crop[assigned].detach())
            others = [crop for crop in range(crops) if crop != assigned]
            of_crop = scores.new_zeros((), dtype=torch.float32)
            for crop in others:
                predicted = F.log_softmax(by_crop[crop] / TEMPERATURE, dim=1)
                of_crop = of_crop - (code * predicted).sum(dim=1).mean()
            loss = loss + of_crop / len(others)
        loss = loss / 2  # by the crops that give codes
        loss.backward()  # type: ignore[no-untyped-call]
        _larc(parameters)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, wrapped


@torch.no_grad()
def _larc(parameters: Sequence[Tensor]) -> None:
    """Applies LARC to the gradients, tensor by tensor without clipping, as Apex does."""
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        value_norm, grad_norm = parameter.norm(), grad.norm()
        if value_norm != 0 and grad_norm != 0:
            rate = TRUST * value_norm / (grad_norm + value_norm * WEIGHT_DECAY + 1e-8)
            grad.add_(parameter, alpha=WEIGHT_DECAY).mul_(rate)


def lightly_step(
    model: MultiCropModel, name: str, *, crops: int, autocast: bool = False
) -> tuple[Step, DistributedDataParallel]:
    """Builds a step with lightly's head, prototypes and loss, as in its documentation, and DDP.

    lightly's head has a BatchNorm, which SEER's head does not have.

    Raises:
        ImportError: if lightly is not installed.
    """
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

    device = next(model.parameters()).device
    hidden, out = (layer for layer in model.head.layers if isinstance(layer, nn.Linear))

    class Lightly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torchvision_trunk(model, name)
            self.projection_head = SwaVProjectionHead(
                hidden.in_features, hidden.out_features, out.out_features
            )
            self.prototypes = SwaVPrototypes(out.out_features, model.prototypes.count)

        def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
            return [
                self.prototypes(F.normalize(self.projection_head(self.backbone(crop)), dim=1))
                for crop in images
            ]

    own = Lightly().to(device).train()
    wrapped = DistributedDataParallel(own, device_ids=[device] if device.type == "cuda" else None)
    criterion = SwaVLoss(TEMPERATURE, ITERATIONS, EPSILON, sinkhorn_gather_distributed=True)
    optimizer = torch.optim.SGD(own.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def step(images: Sequence[Tensor]) -> Tensor:
        own.prototypes.normalize()
        high, low = images[0].chunk(2), images[1].chunk(crops - 2)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            scores = [s.float() for s in wrapped([*high, *low])]
        loss: Tensor = criterion(scores[:2], scores[2:])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, wrapped
