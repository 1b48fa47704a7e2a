"""Strategy `ddp`: every rank holds the whole model; torch's DDP averages the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from seer_scale.optim import Slice, SliceSGD
from seer_scale.parallel import distributed


class DdpEngine:
    """See `Engine`. One rank alone runs the bare model."""

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module, int], SliceSGD],
        *,
        gradient_accumulation: int,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.model = model
        self._device = next(model.parameters()).device
        # Buffers are equal by SyncBatchNorm or differ by design (groups): nothing to broadcast.
        self._module = (
            DistributedDataParallel(
                model,
                device_ids=[self._device] if self._device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
            if distributed.world_size() > 1
            else model
        )
        self._optimizer = build_optimizer(model, 1)
        self._accumulation = gradient_accumulation
        self._autocast_dtype = autocast_dtype
        self._micro_batches = 0

    def __call__(self, crops: list[Tensor], queue: Tensor | None) -> tuple[Tensor, Tensor]:
        # DDP decides in the forward whether the next backward communicates.
        self._set_sync(self._micro_batches + 1 == self._accumulation)
        with torch.autocast(
            self._device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None
        ):
            embeddings, scores = self._module(crops, queue)
        return embeddings, scores

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]

    def step(self) -> Tensor | None:
        self._micro_batches += 1
        if self._micro_batches < self._accumulation:
            return None
        self._micro_batches = 0
        self._optimizer.step()
        self._optimizer.zero_grad()
        return self._optimizer.take_grad_norm()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def slices(self) -> Iterator[Slice]:
        return self._optimizer.slices()

    @property
    def writes_slices(self) -> bool:
        return distributed.is_main()

    def _set_sync(self, last: bool) -> None:
        if isinstance(self._module, DistributedDataParallel):
            self._module.require_backward_grad_sync = last
