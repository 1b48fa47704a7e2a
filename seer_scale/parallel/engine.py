"""The Engine: DeepSpeed's verbs over any sharding strategy, and the one order they are built in.

The trainer calls, `backward`s, `step`s and reads `slices`; it never asks which strategy it runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from seer_scale.config import RunConfig
from seer_scale.models import MultiCropModel
from seer_scale.optim import Slice, SliceSGD, parameter_groups
from seer_scale.parallel.activation_checkpoint import apply_activation_checkpointing
from seer_scale.parallel.batchnorm import convert_sync_batchnorm

PROTOTYPES = frozenset({"prototypes.weight"})


class Engine(Protocol):
    """A model under one sharding strategy, with its optimizer."""

    model: nn.Module  # for buffers and structure; its parameters may be partitioned

    def __call__(self, crops: list[Tensor], queue: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings [crops * B, D] and scores [crops * B + queue rows, K]."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds this micro-batch's share of the step's mean gradient."""
        ...

    def step(self) -> Tensor | None:
        """Call after every micro-batch; at the last of a step it updates and returns grad_norm."""
        ...

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group per tensor, for the schedules."""
        ...

    def slices(self) -> Iterator[Slice]:
        """This rank's slices of the float32 master weights and their momentum."""
        ...

    @property
    def writes_slices(self) -> bool:
        """Whether this rank's slices belong in a checkpoint: replicas do not."""
        ...


def shard(
    build: Callable[[torch.device], MultiCropModel],
    fill: Callable[[nn.Module], None],
    config: RunConfig,
    ds_config: dict[str, Any] | None,
    device: torch.device,
) -> Engine:
    """Builds a model and puts it under `config.sharding.strategy`, in the one order there is.

    build -> grouped SyncBatchNorm -> activation checkpointing -> materialise -> initialise or load
    -> optimizer -> engine. Memory for weights is first taken after the structure is final.

    Args:
        build: makes the model on the device it is given (here: meta).
        fill: gives every parameter and buffer its value, from a seed or from a checkpoint.
        config: the run's configuration.
        ds_config: resolved DeepSpeed configuration, for strategy `zero`.
        device: where the training runs.
    """
    model = build(torch.device("meta"))
    convert_sync_batchnorm(model, config.sharding.sync_bn_group_size)
    apply_activation_checkpointing(
        model.blocks(),
        config.sharding.activation_checkpointing,
        config.sharding.checkpoint_groups,
    )
    model.to_empty(device=device)
    fill(model)
    model.train()

    def build_optimizer(model: nn.Module, shards: int) -> SliceSGD:
        optim = config.optim
        return SliceSGD(
            parameter_groups(model, unit_rows=PROTOTYPES),
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            trust_coefficient=optim.trust_coefficient if optim.larc else None,
            shards=shards,
        )

    if config.sharding.strategy == "zero":
        from seer_scale.parallel.zero import ZeroEngine

        assert ds_config is not None
        return ZeroEngine(model, build_optimizer, ds_config)
    from seer_scale.parallel.ddp import DdpEngine

    return DdpEngine(
        model,
        build_optimizer,
        gradient_accumulation=config.train.gradient_accumulation,
        autocast_dtype=torch.bfloat16 if config.train.precision == "bf16" else None,
    )
