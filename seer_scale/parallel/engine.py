"""The Engine: DeepSpeed's verbs over any sharding strategy, and the one order of building it.

The training loop calls the engine, then `backward` and `step`, and reads `slices`. The loop never
asks which strategy it runs on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.models import OnTrunk, align_channels, paddings_of
from seer_scale.optim.filling import fill
from seer_scale.optim.loss_scale import LossScale
from seer_scale.optim.options import OptimizerOptions
from seer_scale.optim.slices import Slice, Values, with_padding
from seer_scale.parallel import apex, fairscale
from seer_scale.parallel.activation_budget import RecomputePlan
from seer_scale.parallel.activation_checkpoint import apply_activation_checkpointing
from seer_scale.parallel.batchnorm import GroupedSyncBatchNorm
from seer_scale.parallel.build_optimizer import build_optimizer, tensor_groups
from seer_scale.parallel.compile import apply_compile
from seer_scale.parallel.convert_batchnorm import convert_sync_batchnorm
from seer_scale.parallel.fsdp import build_mesh, shard_units, unit_parameters
from seer_scale.parallel.fused_backward import FusedBackward
from seer_scale.parallel.offload import uses_nvme
from seer_scale.parallel.options import ShardingOptions
from seer_scale.parallel.precision import SCALED, apply_autocast, gathered_as
from seer_scale.parallel.torch_engine import TorchEngine, wrap_ddp
from seer_scale.parallel.zero_limits import with_limits


class Engine(Protocol):
    """A model under one sharding strategy, with its optimizer."""

    model: nn.Module  # for buffers and structure; its parameters may be partitioned

    def __call__(self, crops: list[Tensor], queue: Tensor | None) -> tuple[Tensor, Tensor]:
        """Computes embeddings [crops * B, D] and scores [crops * B + queue rows, K].

        Args:
            crops: a tensor per resolution, [count * B, 3, size, size].
            queue: earlier embeddings [rows, D] to be scored too, or None.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds this micro-batch's share to the step's mean gradient; `loss` is []."""
        ...

    def step(self) -> Tensor | None:
        """Counts a micro-batch; the last of a step updates and returns the gradient's norm [].

        Call this after every `backward`. Before the last micro-batch the result is None.
        """
        ...

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Settings of the optimizer, a dictionary per tensor, for the schedules."""
        ...

    @property
    def loss_scale(self) -> LossScale | None:
        """Loss scale of float16; None for the other precisions."""
        ...

    def slices(self) -> Iterator[Slice]:
        """Yields this rank's slices of the float32 master weights and their momentum, [n] each.

        Use each slice before asking for the next: a slice that is offloaded to disk is in memory
        only until then.
        """
        ...

    @property
    def slices_stay(self) -> bool:
        """Whether the memory of `slices` stays allocated and unchanged until `step`."""
        ...

    @property
    def holds_all(self) -> bool:
        """Whether the slices of every rank are all tensors, whole."""
        ...

    def written_slices(self) -> Iterator[Slice]:
        """The slices that this rank writes into a checkpoint; all ranks together write all."""
        ...


def shard(
    build: Callable[[torch.device], OnTrunk],
    source: Callable[[nn.Module], Values],
    sharding: ShardingOptions,
    optimizer: OptimizerOptions,
    *,
    precision: str,
    device: torch.device,
    ds_config: dict[str, Any] | None = None,
    plan: RecomputePlan | None = None,
) -> Engine:
    """Builds a model and distributes it by `sharding.strategy`, in one fixed order.

    build on meta -> aligned channels -> grouped SyncBatchNorm -> compile -> activation
    checkpointing -> precision -> shard -> initialise or load what this rank holds -> optimizer ->
    engine. Memory for weights is first taken after the structure is final.

    Args:
        build: makes the model on the given device (here: meta).
        source: returns where every tensor's values come from (a seed, or a checkpoint), given the
            model on meta before its channels are aligned.
        sharding: options that `compatibility.check_sharding` has accepted.
        optimizer: numbers of the optimizer.
        precision: fp32, bf16, amp-o1 or apex-o1.
        device: device of this rank.
        ds_config: resolved DeepSpeed configuration, for strategy `zero`.
        plan: blocks to recompute, for `activation_checkpointing` auto:GIB.

    Raises:
        ValueError: if strategy `zero` has no `ds_config`, or auto:GIB has no `plan`.
    """
    mode = sharding.activation_checkpointing
    if mode.startswith("auto") and plan is None:
        raise ValueError(f"activation checkpointing {mode} needs a plan: see plan_recompute")
    model = build(torch.device("meta"))
    values = source(model)
    align_channels(model.trunk, sharding.align_channels)
    values = with_padding(values, paddings_of(model))
    layer = apex.sync_batchnorm if sharding.syncbn == "apex" else GroupedSyncBatchNorm
    convert_sync_batchnorm(model, sharding.sync_bn_group_size, layer)
    if precision == "apex-o1":
        apex.apply_o1(model)
    if sharding.compile:
        apply_compile([*itertools.chain(*model.blocks())])
    apply_activation_checkpointing(
        model.stages(), mode, sharding.checkpoint_groups, plan.recomputed if plan else ()
    )
    apply_autocast(model, precision, device)
    loss_scale = LossScale() if precision in SCALED else None
    low = gathered_as(sharding.strategy, precision, compiled=sharding.compile)
    if sharding.strategy in ("fsdp", "hsdp"):
        return _fsdp(model, values, sharding, optimizer, loss_scale, device, low)
    if sharding.strategy == "zero":
        if ds_config is None:
            raise ValueError("strategy zero needs a DeepSpeed configuration")
        return _zero(model, values, ds_config, optimizer, loss_scale, device, low)
    if sharding.strategy == "fairscale":
        return _fairscale(model, values, sharding, optimizer, loss_scale, device)
    return _ddp(model, values, sharding, optimizer, loss_scale, device)


def _ddp(
    model: OnTrunk,
    values: Values,
    sharding: ShardingOptions,
    options: OptimizerOptions,
    loss_scale: LossScale | None,
    device: torch.device,
) -> Engine:
    model.to_empty(device=device)
    fill(model, values)
    alone = distributed.world_size() == 1
    optimizer = build_optimizer(tensor_groups(model), options, loss_scale)
    fused = None
    if options.fuse_backward:
        units = [[parameter] for parameter in model.parameters()]
        fused = FusedBackward(optimizer, units, learn=False)
    return TorchEngine(
        model,
        model.train() if alone else wrap_ddp(model.train(), device),
        optimizer,
        gradient_accumulation=sharding.gradient_accumulation,
        writes=(0, 1) if distributed.is_main() else None,
        holds_all=True,
        fused=fused,
    )


def _fsdp(
    model: OnTrunk,
    values: Values,
    sharding: ShardingOptions,
    options: OptimizerOptions,
    loss_scale: LossScale | None,
    device: torch.device,
    low: torch.dtype | None,
) -> Engine:
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
        low=low,
        low_layers=frozenset(model.low_precision_layers()),
    )
    model.to_empty(device=device)
    fill(model, values)
    optimizer = build_optimizer(
        tensor_groups(model),
        options,
        loss_scale,
        shards=mesh["shard"].size(),
        shard_group=mesh.get_group("shard"),
    )
    fused = None
    if options.fuse_backward:
        fused = FusedBackward(optimizer, unit_parameters(model, units), learn=True)
    return TorchEngine(
        model,
        model.train(),
        optimizer,
        gradient_accumulation=sharding.gradient_accumulation,
        writes=(mesh.get_local_rank("replicate"), mesh["replicate"].size()) if hybrid else (0, 1),
        fused=fused,
    )


def _fairscale(
    model: OnTrunk,
    values: Values,
    sharding: ShardingOptions,
    options: OptimizerOptions,
    loss_scale: LossScale | None,
    device: torch.device,
) -> Engine:
    whole = fairscale.wrap_units(
        model,
        model.units(sharding.unit_parameters),
        values,
        device,
        reshard_after_forward=sharding.reshard_after_forward,
    )
    return TorchEngine(
        whole,
        whole.train(),
        build_optimizer(tensor_groups(whole), options, loss_scale, shards=distributed.world_size()),
        gradient_accumulation=sharding.gradient_accumulation,
        writes=(0, 1),
    )


def _zero(
    model: OnTrunk,
    values: Values,
    ds_config: dict[str, Any],
    options: OptimizerOptions,
    loss_scale: LossScale | None,
    device: torch.device,
    low: torch.dtype | None,
) -> Engine:
    from seer_scale.parallel.zero import ZeroEngine, compile_for_nvme, fill_partitioned, gather_as

    blocks = (sum(p.numel() for p in b.parameters()) for stage in model.blocks() for b in stage)
    zero = with_limits(ds_config["zero_optimization"], max(blocks))
    ds_config = {**ds_config, "zero_optimization": zero}
    if uses_nvme(zero):
        compile_for_nvme()
    if zero["stage"] == 3:
        fill_partitioned(model, values, ds_config, device)
        if low is not None:
            gather_as(low, model.low_precision_layers())
    else:
        model.to_empty(device=device)
        fill(model, values)
    return ZeroEngine(
        model.train(),
        tensor_groups(model),
        lambda groups, shards: build_optimizer(groups, options, loss_scale, shards=shards),
        ds_config,
    )
