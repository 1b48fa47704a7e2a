"""From a RunConfig to the engine of a run: options, their check, and the recomputed blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from seer_scale.config import RunConfig
from seer_scale.models import MultiCropModel
from seer_scale.optim.options import OptimizerOptions
from seer_scale.optim.slices import Values
from seer_scale.parallel.activation_budget import RecomputePlan, plan_recompute
from seer_scale.parallel.compatibility import (
    check_sharding,
    check_skips,
    resolve_max_nonfinite,
    steps_one_by_one,
)
from seer_scale.parallel.engine import Engine, shard
from seer_scale.parallel.options import ShardingOptions
from seer_scale.parallel.precision import held_as
from seer_scale.performance.profiler import check_ranks
from seer_scale.train.build_model import model_of


def sharding_options(config: RunConfig) -> ShardingOptions:
    """Returns the options by which the run distributes its model."""
    return ShardingOptions(
        **config.sharding.model_dump(),
        align_channels=config.model.align_channels,
        compile=config.train.compile,
        gradient_accumulation=config.train.gradient_accumulation,
    )


def optimizer_options(config: RunConfig) -> OptimizerOptions:
    """Returns the run's options of the optimizer; LARC is off without a trust coefficient."""
    optim = config.optim
    return OptimizerOptions(
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        trust_coefficient=optim.trust_coefficient if optim.larc else None,
        fuse_backward=optim.fuse_backward,
        momentum_on_host=optim.momentum_on_host,
    )


def check_run(
    config: RunConfig,
    ds_config: dict[str, Any] | None,
    *,
    world_size: int,
    local_world_size: int,
    cuda: bool,
) -> None:
    """Refuses a combination of keys that cannot be trained, or not exactly.

    Args:
        config: the run's configuration.
        ds_config: resolved DeepSpeed configuration, for strategy `zero`.
        world_size: ranks of the run.
        local_world_size: ranks of a node.
        cuda: whether the ranks have GPUs.

    Raises:
        ConfigError: one sentence with the key, its value, what is allowed and what to do.
    """
    optimizer = optimizer_options(config)
    check_skips(
        max_nonfinite=config.train.max_nonfinite,
        on_spike=config.train.on_spike,
        one_by_one=steps_one_by_one(optimizer, ds_config),
    )
    if config.profile.steps is not None:
        check_ranks(config.profile.ranks, world_size)
    check_sharding(
        sharding_options(config),
        optimizer,
        ds_config,
        trunk=config.model.trunk,
        precision=config.train.precision,
        world_size=world_size,
        local_world_size=local_world_size,
        cuda=cuda,
    )


def max_nonfinite_of(config: RunConfig, ds_config: dict[str, Any] | None) -> int:
    """Returns the number of consecutive non-finite steps after which the run stops."""
    one_by_one = steps_one_by_one(optimizer_options(config), ds_config)
    return resolve_max_nonfinite(config.train.max_nonfinite, one_by_one)


def recompute_plan_of(
    config: RunConfig, model: Callable[[torch.device], MultiCropModel] | None = None
) -> RecomputePlan | None:
    """Chooses the blocks that `activation_checkpointing=auto:GIB` recomputes; None in other modes.

    Args:
        config: the run's configuration.
        model: makes the model on the given device; the run's own unless given.

    Raises:
        ConfigError: if the budget is below the least possible.
    """
    budget, data = config.sharding.activation_budget, config.data
    if budget is None:
        return None
    images = [count * config.train.micro_batch_size for count in data.crop_counts]
    return plan_recompute(
        model or partial(model_of, config),
        crops=list(zip(images, data.crop_sizes, strict=True)),
        precision=config.train.precision,
        budget=budget,
        align=config.model.align_channels,
        weights=held_as(
            config.sharding.strategy, config.train.precision, compiled=config.train.compile
        ),
    )


def engine_of(
    config: RunConfig,
    source: Callable[[nn.Module], Values],
    ds_config: dict[str, Any] | None,
    device: torch.device,
    plan: RecomputePlan | None = None,
    model: Callable[[torch.device], MultiCropModel] | None = None,
) -> Engine:
    """Builds the run's model, distributed, with its optimizer; see `parallel.engine.shard`.

    Args:
        config: the run's configuration, accepted by `check_run`.
        source: maps the model on meta to the values of its tensors; a seed or a checkpoint.
        ds_config: resolved DeepSpeed configuration, for strategy `zero`.
        device: device of this rank.
        plan: from `recompute_plan_of`; made here unless given.
        model: makes the model on the given device; the run's own unless given.
    """
    return shard(
        model or partial(model_of, config),
        source,
        sharding_options(config),
        optimizer_options(config),
        precision=config.train.precision,
        device=device,
        ds_config=ds_config,
        plan=plan or recompute_plan_of(config, model),
    )
