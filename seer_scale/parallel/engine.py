"""The Engine: DeepSpeed's verbs over any sharding strategy, and the one order they are built in.

The trainer calls, `backward`s, `step`s and reads `slices`; it never asks which strategy it runs on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from seer_scale import distributed
from seer_scale.config import RunConfig
from seer_scale.models import MultiCropModel, OnTrunk, align_channels, paddings_of
from seer_scale.optim.slice_sgd import SliceSGD, parameter_groups
from seer_scale.optim.slices import Slice, Values, fill, with_padding
from seer_scale.parallel import apex, fairscale
from seer_scale.parallel.activation_budget import RecomputePlan, plan_recompute
from seer_scale.parallel.activation_checkpoint import apply_activation_checkpointing
from seer_scale.parallel.batchnorm import GroupedSyncBatchNorm, convert_sync_batchnorm
from seer_scale.parallel.compile import apply_compile
from seer_scale.parallel.fsdp import build_mesh, shard_units, unit_parameters
from seer_scale.parallel.fused_backward import FusedBackward
from seer_scale.parallel.precision import SCALED, LossScale, apply_autocast
from seer_scale.parallel.torch_engine import TorchEngine, wrap_ddp

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

    @property
    def loss_scale(self) -> LossScale | None:
        """Of float16; None where the precision needs none."""
        ...

    def slices(self) -> Iterator[Slice]:
        """This rank's slices of the float32 master weights and their momentum.

        Use one before the next: a slice that is offloaded to disk is there only meanwhile.
        """
        ...

    @property
    def slices_stay(self) -> bool:
        """Whether the memory of `slices` stays as it is until `step`, or goes or changes before."""
        ...

    @property
    def writes_slices(self) -> bool:
        """Whether this rank's slices belong in a checkpoint: replicas do not."""
        ...


def shard(
    build: Callable[[torch.device], OnTrunk],
    source: Callable[[nn.Module], Values],
    config: RunConfig,
    ds_config: dict[str, Any] | None,
    device: torch.device,
    plan: RecomputePlan | None = None,
) -> Engine:
    """Builds a model and puts it under `config.sharding.strategy`, in the one order there is.

    build on meta -> aligned channels -> grouped SyncBatchNorm -> compile -> activation
    checkpointing -> precision -> shard -> initialise or load what this rank holds -> optimizer ->
    engine. Memory for weights is first taken after the structure is final.

    Args:
        build: makes the model on the device it is given (here: meta).
        source: from the model on meta, not aligned, where every tensor's values come from: a seed,
            or a checkpoint.
        config: the run's configuration, which `check.check_sharding` has passed.
        ds_config: resolved DeepSpeed configuration, for strategy `zero`.
        device: where the training runs.
        plan: of `recompute_plan`, if the caller has asked for it before.
    """
    sharding, train = config.sharding, config.train
    plan = plan or recompute_plan(build, config)
    model = build(torch.device("meta"))
    values = source(model)
    align_channels(model.trunk, config.model.align_channels)
    values = with_padding(values, paddings_of(model))
    layer = apex.sync_batchnorm if sharding.syncbn == "apex" else GroupedSyncBatchNorm
    convert_sync_batchnorm(model, sharding.sync_bn_group_size, layer)
    if train.precision == "apex-o1":
        apex.apply_o1(cast(MultiCropModel, model))  # fine-tuning offers no Apex
    if train.compile:
        apply_compile([*itertools.chain(*model.blocks())])
    apply_activation_checkpointing(
        model.stages(),
        sharding.activation_checkpointing,
        sharding.checkpoint_groups,
        plan.recomputed if plan else (),
    )
    apply_autocast(model, train.precision, device)
    if sharding.strategy in ("fsdp", "hsdp"):
        return _fsdp(model, values, config, device)
    if sharding.strategy == "zero":
        assert ds_config is not None
        return _zero(model, values, config, ds_config, device)
    if sharding.strategy == "fairscale":
        return _fairscale(model, values, config, device)
    return _ddp(model, values, config, device)


def recompute_plan(
    build: Callable[[torch.device], OnTrunk], config: RunConfig
) -> RecomputePlan | None:
    """What `sharding.activation_checkpointing=auto:GIB` recomputes; None for other modes.

    Raises:
        ConfigError: if the budget is below the least possible.
    """
    budget, data = config.sharding.activation_budget, config.data
    if budget is None:
        return None
    images = [count * config.train.micro_batch_size for count in data.crop_counts]

    def build_aligned(device: torch.device) -> MultiCropModel:
        model = cast(MultiCropModel, build(device))  # fine-tuning offers no budget
        align_channels(model.trunk, config.model.align_channels)
        return model

    return plan_recompute(
        build_aligned,
        crops=list(zip(images, data.crop_sizes, strict=True)),
        precision=config.train.precision,
        budget=budget,
    )


def _ddp(model: OnTrunk, values: Values, config: RunConfig, device: torch.device) -> Engine:
    model.to_empty(device=device)
    fill(model, values)
    alone = distributed.world_size() == 1
    optimizer = _optimizer(model, config)
    fused = None
    if config.optim.fuse_backward:
        units = [[parameter] for parameter in model.parameters()]
        fused = FusedBackward(optimizer, units, learn=False)
    return TorchEngine(
        model,
        model.train() if alone else wrap_ddp(model.train(), device),
        optimizer,
        gradient_accumulation=config.train.gradient_accumulation,
        writes_slices=distributed.is_main(),
        fused=fused,
    )


def _fsdp(model: OnTrunk, values: Values, config: RunConfig, device: torch.device) -> Engine:
    sharding = config.sharding
    hybrid = sharding.strategy == "hsdp"
    mesh = build_mesh(
        device, (sharding.shard_size or distributed.local_world_size()) if hybrid else None
    )
    units = model.units(sharding.unit_parameters)
    shard_units(
        model,
        units,
        mesh,
        reshard_after_forward=sharding.reshard_after_forward,
        prefetch=sharding.prefetch,
    )
    model.to_empty(device=device)
    fill(model, values)
    optimizer = _optimizer(
        model, config, shards=mesh["shard"].size(), shard_group=mesh.get_group("shard")
    )
    fused = None
    if config.optim.fuse_backward:
        fused = FusedBackward(optimizer, unit_parameters(model, units), learn=True)
    return TorchEngine(
        model,
        model.train(),
        optimizer,
        gradient_accumulation=config.train.gradient_accumulation,
        writes_slices=not hybrid or mesh.get_local_rank("replicate") == 0,
        fused=fused,
    )


def _fairscale(model: OnTrunk, values: Values, config: RunConfig, device: torch.device) -> Engine:
    whole = fairscale.wrap_units(
        model,
        model.units(config.sharding.unit_parameters),
        values,
        device,
        reshard_after_forward=config.sharding.reshard_after_forward,
    )
    return TorchEngine(
        whole,
        whole.train(),
        _optimizer(whole, config, shards=distributed.world_size()),
        gradient_accumulation=config.train.gradient_accumulation,
        writes_slices=True,
    )


def _zero(
    model: OnTrunk,
    values: Values,
    config: RunConfig,
    ds_config: dict[str, Any],
    device: torch.device,
) -> Engine:
    from seer_scale.parallel.zero import ZeroEngine, fill_partitioned

    if ds_config["zero_optimization"]["stage"] == 3:
        fill_partitioned(model, values, ds_config, device)
    else:
        model.to_empty(device=device)
        fill(model, values)
    return ZeroEngine(
        model.train(), lambda model, shards: _optimizer(model, config, shards=shards), ds_config
    )


def _optimizer(
    model: nn.Module,
    config: RunConfig,
    *,
    shards: int = 1,
    shard_group: ProcessGroup | None = None,
) -> SliceSGD:
    optim = config.optim
    return SliceSGD(
        parameter_groups(model, unit_rows=PROTOTYPES, paddings=paddings_of(model)),
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        trust_coefficient=optim.trust_coefficient if optim.larc else None,
        shards=shards,
        shard_group=shard_group,
        loss_scale=LossScale() if config.train.precision in SCALED else None,
        momentum_on_host=optim.momentum_on_host,
    )
