"""Slices: the contiguous run of a tensor's elements that a rank holds, under any strategy.

A whole tensor (DDP), a DTensor shard of rows (FSDP) and a flat partition (ZeRO, FairScale) are all
slices, so that optimizer, initial values and checkpoints are written once, for slices. A tensor
with aligned channels has zeros as padding; values enter and leave a slice without the padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from seer_scale.models.align import paddings_of
from seer_scale.models.padding import Padding

# (name, start, stop) -> elements `start` to `stop` of that tensor, flat [stop - start]; the values
# come from a seed or from a checkpoint.
Values = Callable[[str, int, int], Tensor]


@dataclass(frozen=True)
class Slice:
    """A contiguous run of a tensor's elements, held by this rank as flat views.

    Writing to `values` or `momentum` changes the training.

    Attributes:
        name: name of the tensor.
        shape: shape of the whole tensor; of the padded one if there is `padding`.
        offset: number of elements of the whole tensor before the slice.
        values: float32 view [n] into the master weights.
        momentum: float32 view [n] into the optimizer state.
        padding: padding of a tensor with aligned channels, or None.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    values: Tensor
    momentum: Tensor
    padding: Padding | None = None

    def without_padding(self) -> Slice:
        """Returns the slice as files hold it; with padding a copy, perhaps without elements."""
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
    """Returns `values` for a model that holds these tensors padded with zeros.

    Args:
        values: source of the values without padding.
        paddings: padding by tensor name.
    """

    def padded(name: str, start: int, stop: int) -> Tensor:
        if name not in paddings:
            return values(name, start, stop)
        padding = paddings[name]
        real = values(name, padding.before(start), padding.before(stop))
        return padding.put_in(real, start, stop - start)

    return padded


def buffers_without_padding(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields name and value of the buffers of `model` as files hold them, without padding."""
    paddings = paddings_of(model)
    for name, buffer in model.named_buffers():
        padding = paddings.get(name)
        if padding:
            buffer = padding.take_out(buffer.view(-1), 0).view(padding.real_shape)
        yield name, buffer


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor: the shard of a DTensor, or the whole other tensor."""
    # The shard is a view, because optimizers and initialisation run outside autograd.
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def extent(tensor: Tensor, shape: tuple[int, ...], rank: int, shards: int) -> tuple[int, int]:
    """Computes the offset of this rank's part of a tensor, and its length without padding.

    Args:
        tensor: a DTensor sharded by rows; or a flat partition, one of `shards` equal partitions
            that follow each other in rank order, the last one padded; or, with one shard, the whole
            tensor.
        shape: shape of the whole tensor.
        rank: rank of this process among the shards.
        shards: number of ranks that hold one part each.
    """
    if isinstance(tensor, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        length = math.prod(sizes)
        return (offsets[0] * math.prod(shape[1:]) if length and offsets else 0), length
    offset = rank * tensor.numel() if shards > 1 else 0
    return offset, max(0, min(tensor.numel(), math.prod(shape) - offset))
