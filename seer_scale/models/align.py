"""Pads channels to a multiple that tensor cores are fast at; the function stays the same.

Group widths of 373 or 1010 make every convolution take a slow path. Each group is given zero
channels up to the next multiple: zero rows and columns in the weights, zero scale and shift in the
BatchNorm. Their activations and gradients are all 0, so the padding stays 0; docs/performance.md
shows this layer by layer.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from seer_scale.models.padding import Axis, Padding
from seer_scale.models.regnet import Block, RegNet


class DropPadding(nn.Module):
    """Removes the padding of channels: [B, groups * held, ...] to [B, groups * real, ...]."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Returns the real channels in their order; the gradient of the padding is zero."""
        groups = x.reshape(len(x), self.axis.groups, self.axis.held, *x.shape[2:])
        return groups[:, :, : self.axis.real].flatten(1, 2)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return ", ".join(f"{key}={value}" for key, value in self.axis._asdict().items())


def align_channels(trunk: RegNet, multiple: int) -> None:
    """Pads every group of channels of `trunk` to a multiple of `multiple`, in place.

    The stem, the groups of each stage and the squeezed channels are padded; the features that leave
    the trunk are not. Tensors that grow are new and without values: `paddings_of` says where the
    values go, and the other elements must be zero.

    Args:
        trunk: without values yet (on meta), and not aligned before.
        multiple: number that channels are a multiple of afterwards; 1 changes nothing.
    """
    names = {module: name for name, module in trunk.named_modules()}

    def axis(groups: int, channels: int) -> Axis:
        real = channels // groups
        return Axis(groups, real, -(-real // multiple) * multiple)

    def pad(layer: nn.Module, leaf: str, *axes: Axis) -> None:
        tensor, padding = getattr(layer, leaf), Padding(axes)
        if tensor is None or padding.held_shape == padding.real_shape:
            return
        held = tensor.new_empty(padding.held_shape)
        setattr(layer, leaf, nn.Parameter(held) if isinstance(tensor, nn.Parameter) else held)
        trunk.paddings[f"{names[layer]}.{leaf}"] = padding

    def pad_layer(layer: nn.Module, into: Axis, out: Axis) -> None:
        """Pads a convolution, and the BatchNorm after it if there is one, from `into` to `out`."""
        conv, *behind = layer if isinstance(layer, nn.Sequential) else [layer]
        assert isinstance(conv, nn.Conv2d)
        own = Axis(1, into.real, into.held) if conv.groups > 1 else into
        pad(conv, "weight", out, own, *(Axis(1, size, size) for size in conv.kernel_size))
        pad(conv, "bias", out)
        conv.in_channels, conv.out_channels = into.groups * into.held, out.groups * out.held
        for norm in behind[:1]:
            assert isinstance(norm, nn.BatchNorm2d)
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                pad(norm, leaf, out)
            norm.num_features = conv.out_channels

    stem = trunk.stem[0]
    stream = axis(1, stem.out_channels)
    pad_layer(trunk.stem, Axis(1, stem.in_channels, stem.in_channels), stream)
    for block in itertools.chain(*trunk.blocks()):
        assert isinstance(block, Block)
        grouped, squeezed = block.f.b[0], block.f.se.fc1.out_channels
        width = axis(grouped.groups, grouped.out_channels)
        if block.proj is not None:
            pad_layer(block.proj, stream, width)
        pad_layer(block.f.a, stream, width)
        pad_layer(block.f.b, width, width)
        pad_layer(block.f.se.fc1, width, axis(1, squeezed))
        pad_layer(block.f.se.fc2, axis(1, squeezed), width)
        pad_layer(block.f.c, width, width)
        stream = width
    if stream.held > stream.real:
        trunk.avgpool = nn.Sequential(trunk.avgpool, DropPadding(stream))


def paddings_of(model: nn.Module) -> dict[str, Padding]:
    """The padding of every padded parameter and buffer, by its name in `model`."""
    return {
        f"{prefix}.{name}" if prefix else name: padding
        for prefix, module in model.named_modules()
        if isinstance(module, RegNet)
        for name, padding in module.paddings.items()
    }
