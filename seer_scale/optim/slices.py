"""What a rank holds of a tensor: a contiguous run of its elements, whatever the strategy.

A whole tensor (DDP), a DTensor shard of rows (FSDP) and a flat partition (ZeRO, FairScale) are the
same kind of thing, and optimizer, initial values and checkpoints are written on it once. Of tensors
with aligned channels a rank holds zeros as well; values come in and go out without them, here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from seer_scale.models.align import paddings_of
from seer_scale.models.padding import Padding

# Elements `start` to `stop` of the tensor `name`, flat: from a seed, or from a checkpoint.
Values = Callable[[str, int, int], Tensor]


@dataclass(frozen=True)
class Slice:
    """A contiguous run of a tensor's elements, held by this rank as flat views.

    `values` and `momentum` are float32 views [n] into the master weights and optimizer state:
    writing to them changes the training. Where there is `padding`, all are of the padded tensor.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    values: Tensor
    momentum: Tensor
    padding: Padding | None = None

    def without_padding(self) -> Slice:
        """The slice as files have it: a copy, and perhaps of no elements, if there is padding."""
        if self.padding is None:
            return self
        return Slice(
            self.name,
            self.padding.real_shape,
            self.padding.before(self.offset),
            self.padding.take_out(self.values, self.offset),
            self.padding.take_out(self.momentum, self.offset),
        )


def with_padding(values: Values, paddings: Mapping[str, Padding]) -> Values:
    """The same values for a model that holds these tensors padded, with zeros as padding."""

    def padded(name: str, start: int, stop: int) -> Tensor:
        if name not in paddings:
            return values(name, start, stop)
        padding = paddings[name]
        real = values(name, padding.before(start), padding.before(stop))
        return padding.put_in(real, start, stop - start)

    return padded


def buffers_without_padding(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of `model` as files have them."""
    paddings = paddings_of(model)
    for name, buffer in model.named_buffers():
        padding = paddings.get(name)
        if padding:
            buffer = padding.take_out(buffer.view(-1), 0).view(padding.real_shape)
        yield name, buffer


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: of a DTensor its shard, of any other all of it."""
    # Optimizers and initialisation run outside autograd, where the shard is a view.
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def extent(tensor: Tensor, shape: tuple[int, ...], rank: int, shards: int) -> tuple[int, int]:
    """Where this rank's part of a tensor starts, and how many elements it has without padding.

    Args:
        tensor: a DTensor sharded by rows; or a flat partition, one of `shards` equal ones that
            follow each other in rank order, the last padded; or, with one shard, the whole.
        shape: of the whole tensor.
        rank: of this process among the shards.
        shards: ranks that hold one part each.
    """
    if isinstance(tensor, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        length = math.prod(sizes)
        return (offsets[0] * math.prod(shape[1:]) if length and offsets else 0), length
    offset = rank * tensor.numel() if shards > 1 else 0
    return offset, max(0, min(tensor.numel(), math.prod(shape) - offset))


@torch.no_grad()
def fill(
    model: nn.Module,
    values: Values,
    names: dict[Tensor, str] | None = None,
    *,
    recurse: bool = True,
) -> None:
    """Gives what this rank holds of every parameter and buffer of `model` its value, in place.

    Args:
        model: materialised; its parameters whole or DTensors.
        values: where values come from.
        names: of the tensors in the whole model, where `model` is a part of it.
        recurse: the modules inside of `model` too.

    Raises:
        ValueError: if a tensor has no memory here.
    """
    tensors = [*model.named_parameters(recurse=recurse), *model.named_buffers(recurse=recurse)]
    for own, tensor in tensors:
        name = own if names is None else names[tensor]
        part = local(tensor)
        if part.is_meta:
            raise ValueError(f"{name} has no memory to fill: materialise it first (to_empty)")
        offset, length = extent(tensor, tuple(tensor.shape), 0, 1)
        if length:
            part.copy_(values(name, offset, offset + length).view(part.shape))
