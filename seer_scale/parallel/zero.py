"""Strategy `zero`: DeepSpeed, stages 0 to 3. The only file that imports deepspeed.

DeepSpeed keeps its partitioning, bucketing and communication; the optimizer is ours, with one
parameter group per tensor, so that every partition it is handed is a slice of a single tensor.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seer_scale.optim import Slice, SliceSGD
from seer_scale.parallel import distributed


class ZeroEngine:
    """See `Engine`. Gradient accumulation and autocast follow `ds_config`."""

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module, int], SliceSGD],
        ds_config: dict[str, Any],
    ) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it found no other
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
        # On CPU DeepSpeed would compile an all-reduce of its own at first use: a minute, a
        # compiler, and a lock that a killed build leaves for the next run to wait on. gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Of torch to DeepSpeed, on every rank: nothing a user can act on.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        self.model = model
        self._stage = int(ds_config.get("zero_optimization", {}).get("stage", 0))
        shards = distributed.world_size() if self._stage > 0 else 1
        self._optimizer = build_optimizer(model, shards)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=ds_config,
            dist_init_required=False,
        )

    def __call__(self, crops: list[Tensor], queue: Tensor | None) -> tuple[Tensor, Tensor]:
        embeddings, scores = self._engine(crops, queue)
        return embeddings, scores

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> Tensor | None:
        last: bool = self._engine.is_gradient_accumulation_boundary()
        if last and self._stage > 0 and distributed.world_size() > 1:
            self._reduce_norms()
        self._engine.step()
        return self._optimizer.take_grad_norm() if last else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def slices(self) -> Iterator[Slice]:
        with self._masters():
            yield from list(self._optimizer.slices())

    @property
    def writes_slices(self) -> bool:
        return self._stage > 0 or distributed.is_main()

    @contextmanager
    def _masters(self) -> Iterator[None]:
        """Shows the float32 partitions to the optimizer; ZeRO-3 does so only during a step."""
        if self._stage < 3:
            yield
            return
        self._engine.optimizer._set_fp32_optimizer_param_groups()
        try:
            yield
        finally:
            self._engine.optimizer._clear_fp32_optimizer_param_groups()

    def _reduce_norms(self) -> None:
        """One all-reduce instead of one per tensor, from the partitions of the mean gradient.

        With offload the gradients are elsewhere, and the optimizer reduces tensor by tensor.
        """
        averaged = self._engine.optimizer.averaged_gradients
        with self._masters():
            gradients = {
                group["name"]: averaged[index]
                for index, group in enumerate(self.param_groups)
                if averaged.get(index) is not None
            }
            self._optimizer.reduce_norms(gradients)
