"""Engine of torch's own strategies: autograd, SliceSGD, and a module that torch has wrapped."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from seer_scale import distributed
from seer_scale.optim.loss_scale import LossScale
from seer_scale.optim.slice_sgd import SliceSGD
from seer_scale.optim.slices import Slice
from seer_scale.parallel.fused_backward import FusedBackward


class TorchEngine:
    """An `Engine` of the strategies ddp, fsdp, hsdp and fairscale.

    Args:
        model: the model, for its buffers and structure.
        module: the module to call: the model, or DDP around the model.
        optimizer: optimizer of the model's parameters, as sharded.
        gradient_accumulation: micro-batches per step.
        writes: (k, n) if this rank writes every n-th of its slices into a checkpoint, from the k-th
            on; None if it writes none.
        holds_all: whether the slices of every rank are all tensors, whole.
        fused: steps parameters inside the backward pass; None to step after it.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        optimizer: SliceSGD,
        *,
        gradient_accumulation: int,
        writes: tuple[int, int] | None,
        holds_all: bool = False,
        fused: FusedBackward | None = None,
    ) -> None:
        self.model = model
        self._writes = writes
        self.holds_all = holds_all
        self._module = module
        self._optimizer = optimizer
        self._accumulation = gradient_accumulation
        self._micro_batches = 0
        self._fused = fused

    @property
    def loss_scale(self) -> LossScale | None:
        return self._optimizer.loss_scale

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def __call__(self, crops: list[Tensor], queue: Tensor | None) -> tuple[Tensor, Tensor]:
        if isinstance(self._module, DistributedDataParallel):
            # DDP decides in the forward pass whether the next backward pass communicates. FSDP
            # always communicates: to keep whole gradients until the last micro-batch would undo
            # the sharding.
            last = self._micro_batches + 1 == self._accumulation
            self._module.require_backward_grad_sync = last
        embeddings, scores = self._module(crops, queue)
        return embeddings, scores

    def backward(self, loss: Tensor) -> None:
        scale = self.loss_scale.value if self.loss_scale else 1.0
        (loss * (scale / self._accumulation)).backward()  # type: ignore[no-untyped-call]

    def step(self) -> Tensor | None:
        self._micro_batches += 1
        if self._micro_batches < self._accumulation:
            return None
        self._micro_batches = 0
        if self._fused:
            self._fused.finish()
        else:
            self._optimizer.step()
            self._optimizer.zero_grad()
        return self._optimizer.take_grad_norm()

    def slices(self) -> Iterator[Slice]:
        return self._optimizer.slices()

    def written_slices(self) -> Iterator[Slice]:
        if self._writes is not None:
            first, every = self._writes
            yield from itertools.islice(self.slices(), first, None, every)

    @property
    def slices_stay(self) -> bool:
        return self._fused is None  # a fused step changes them within the backward pass


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wraps `model` for strategy `ddp`: each rank has the whole model; gradients are averaged."""
    on_gpu = device.type == "cuda"
    if not on_gpu:
        # A strided 1x1 convolution's gradient has other strides where a dimension is one: the same
        # bytes in the same order, of which torch warns on every rank.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        # torch 2.14 has a new name for this argument, torch 2.11 only this one.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device] if on_gpu else None,
            # Buffers are equal by SyncBatchNorm, or different by design (groups).
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # DDP puts gradients into other buckets after its first step, and gloo adds more than
            # two numbers in an order that depends on the place in the bucket. A resumed run would
            # differ in the last bit from an uninterrupted one. With `find_unused_parameters` the
            # buckets stay the same; the price is torch's warning that no parameter is unused.
            find_unused_parameters=not on_gpu and distributed.world_size() > 2,
        )
