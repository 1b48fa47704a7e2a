"""Layers of a block that take one tensor, or one for each resolution at once.

Whoever gathers the weights of such a layer does so once a pass and not once a resolution, and its
gradient is complete as soon as the backward pass leaves it. Parameters keep the names and shapes of
torchvision's layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation


class Conv(nn.Conv2d):
    """A convolution of one tensor, or of one for each resolution."""

    @overload
    def forward(self, input: Tensor) -> Tensor: ...
    @overload
    def forward(self, input: list[Tensor]) -> list[Tensor]: ...
    def forward(self, input: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """[B, C, H, W] to [B, out_channels, H / stride, W / stride], or a list of such."""
        if isinstance(input, list):
            return [self.one(x) for x in input]
        return self.one(input)

    def one(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, H / stride, W / stride]."""
        return super().forward(input)


class PooledConv(Conv):
    """A 1x1 convolution of one pixel, as the matrix product that it is.

    torch's convolution of one pixel is a loop over the batch on a CPU: with squeeze-and-excitation
    it took a quarter of a small trunk's step.
    """

    def one(self, input: Tensor) -> Tensor:
        """[B, C, 1, 1] to [B, out_channels, 1, 1]."""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]


class PointwiseConv(Conv):
    """A 1x1 convolution of stride 1; on a CPU in channels_last a matrix product over all pixels.

    That is faster than oneDNN's convolution, and with one thread and few images torch takes one
    instead whose output is contiguous, so that all operations around it meet two formats
    (docs/performance.md).
    """

    def one(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, H, W]."""
        if input.device.type != "cpu" or not input.is_contiguous(memory_format=torch.channels_last):
            return super().one(input)
        pixels = F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return pixels.permute(0, 3, 1, 2)


class Excitation(SqueezeExcitation):  # type: ignore[misc]  # torchvision has no types
    """Squeeze-and-excitation (arXiv 1709.01507) of one tensor, or of one for each resolution.

    Args:
        width: channels of its input.
        squeezed: channels between its two layers.
    """

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__(width, squeezed, nn.ReLU)
        self.fc1 = PooledConv(width, squeezed, 1)
        self.fc2 = PooledConv(squeezed, width, 1)

    @overload
    def forward(self, input: Tensor) -> Tensor: ...
    @overload
    def forward(self, input: list[Tensor]) -> list[Tensor]: ...
    def forward(self, input: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Scales the channels of [B, C, H, W], or of each of a list."""
        if not isinstance(input, list):
            scaled: Tensor = super().forward(input)
            return scaled
        layers = (self.avgpool, self.fc1, self.activation, self.fc2, self.scale_activation)
        scales = layer_by_layer(layers, input)
        return [scale * x for scale, x in zip(scales, input, strict=True)]


def layer_by_layer(layers: Iterable[nn.Module], tensors: list[Tensor]) -> list[Tensor]:
    """Sends all tensors through a layer before the next layer, in order.

    One tensor is given as such, so that a hook on a layer sees what it sees in other networks.
    """
    for layer in layers:
        if len(tensors) > 1 and isinstance(layer, Conv | Excitation):
            tensors = layer(tensors)
        else:
            tensors = [layer(tensor) for tensor in tensors]
    return tensors
