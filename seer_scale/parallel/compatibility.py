"""Refusal of options that do not go together, before a process group, model or folder exists.

`PRECISIONS` and `READ_BY` are tables of docs/sharding.md. No option that a user sets is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seer_scale.config.completion import divisors_of
from seer_scale.config.ds_config import offload_device
from seer_scale.errors import ConfigError
from seer_scale.models.regnet import trunk_config
from seer_scale.optim.options import OptimizerOptions
from seer_scale.parallel import apex, fairscale
from seer_scale.parallel.offload import check_offload
from seer_scale.parallel.options import ShardingOptions

# Strategy -> precisions that it supports.
PRECISIONS = {
    "ddp": ("fp32", "bf16", "amp-o1", "apex-o1"),
    "fsdp": ("fp32", "bf16", "amp-o1"),
    "hsdp": ("fp32", "bf16", "amp-o1"),
    "zero": ("fp32", "bf16", "amp-o1", "apex-o1"),  # apex-o1: stage 0 only
    "fairscale": ("fp32", "bf16", "amp-o1"),
}
# Key of `sharding` -> strategies that read the key.
READ_BY = {
    "shard_size": ("hsdp",),
    "reshard_after_forward": ("fsdp", "hsdp", "fairscale"),
    "prefetch": ("fsdp", "hsdp"),
    "unit_parameters": ("fsdp", "hsdp", "fairscale"),
}


def check_sharding(
    sharding: ShardingOptions,
    optimizer: OptimizerOptions,
    ds_config: Mapping[str, Any] | None,
    *,
    trunk: str,
    precision: str,
    world_size: int,
    local_world_size: int,
    cuda: bool,
) -> None:
    """Refuses a combination of options that cannot be trained, or not exactly.

    Args:
        sharding: how the model is to be distributed.
        optimizer: numbers of the optimizer.
        ds_config: resolved DeepSpeed configuration, for strategy `zero`.
        trunk: name of the trunk.
        precision: fp32, bf16, amp-o1 or apex-o1.
        world_size: ranks of the run.
        local_world_size: ranks of a node.
        cuda: whether the ranks have GPUs.

    Raises:
        ConfigError: one sentence with the key, its value, what is allowed and what to do.
    """
    zero = (ds_config or {}).get("zero_optimization", {})
    _check_groups(sharding, trunk, world_size)
    _check_shards(sharding, world_size, local_world_size)
    _check_extras(sharding, precision, cuda=cuda)
    _check_precision(sharding.strategy, precision, zero)
    _check_compile(sharding, precision, zero)
    _check_momentum_on_host(sharding.strategy, optimizer)
    if optimizer.fuse_backward:
        _check_fused_backward(sharding, precision, world_size)
    check_offload(zero, sharding.deepspeed_config)


def _check_groups(sharding: ShardingOptions, trunk: str, world_size: int) -> None:
    if sharding.sync_bn_group_size > world_size:
        raise ConfigError(
            f"sharding.sync_bn_group_size is {sharding.sync_bn_group_size}, but the run has "
            f"{_ranks(world_size)}: set it to {divisors_of(world_size)}, 0 for all or -1 for a "
            "node's"
        )
    stages, groups = len(trunk_config(trunk).stages), sharding.checkpoint_groups
    if groups is not None and len(groups) != stages:
        raise ConfigError(
            f"sharding.checkpoint_groups has {len(groups)} lists, but {trunk} has {stages} "
            "stages: give one list per stage"
        )


def _check_shards(sharding: ShardingOptions, world_size: int, local_world_size: int) -> None:
    for key, strategies in READ_BY.items():
        value, default = getattr(sharding, key), getattr(ShardingOptions, key)
        if value != default and sharding.strategy not in strategies:
            raise ConfigError(
                f"sharding.{key} is {value}, but sharding.strategy is {sharding.strategy} and "
                f"only {_either(strategies)} reads it: leave it out or change the strategy"
            )
    if sharding.strategy != "hsdp":
        return
    size = sharding.shard_size or local_world_size
    if world_size % size:
        whose = "" if sharding.shard_size else " (a node's ranks)"
        raise ConfigError(
            f"sharding.shard_size is {size}{whose}, but the run has {_ranks(world_size)}: hsdp "
            "needs a shard_size that divides them"
        )


def _check_extras(sharding: ShardingOptions, precision: str, *, cuda: bool) -> None:
    if sharding.strategy == "fairscale" and sharding.align_channels > 1:
        raise ConfigError(
            f"model.align_channels is {sharding.align_channels}, but sharding.strategy is "
            "fairscale, which has not been shown to keep the padding zero: use "
            "sharding.strategy=fsdp, or model.align_channels=1"
        )
    if sharding.strategy == "fairscale" and (reason := fairscale.missing(cuda=cuda)):
        raise ConfigError(
            f"sharding.strategy is fairscale, but {reason}: use sharding.strategy=fsdp, torch's "
            "own successor of it"
        )
    if sharding.strategy == "fairscale" and sharding.activation_checkpointing == "groups":
        raise ConfigError(
            "sharding.activation_checkpointing is groups, but FairScale loses its state where a "
            "recomputation of several units ends early: use full, or sharding.strategy=fsdp"
        )
    if sharding.syncbn == "apex":
        if reason := apex.missing_syncbn(cuda=cuda):
            raise ConfigError(
                f"sharding.syncbn is apex, but {reason}: use sharding.syncbn=native, which "
                "computes the same"
            )
        if precision == "bf16":
            raise ConfigError(
                "sharding.syncbn is apex and train.precision is bf16, but Apex's kernels take "
                "float32 and float16 only: use sharding.syncbn=native or train.precision=amp-o1"
            )
        if sharding.activation_checkpointing != "none":
            raise ConfigError(
                "sharding.syncbn is apex and sharding.activation_checkpointing is "
                f"{sharding.activation_checkpointing}, but Apex's layer would count every batch "
                "twice: use sharding.syncbn=native or sharding.activation_checkpointing=none"
            )
    if precision == "apex-o1" and (reason := apex.missing_amp(cuda=cuda)):
        raise ConfigError(
            f"train.precision is apex-o1, but {reason}: use train.precision=amp-o1, the same "
            "policy by torch"
        )


def _check_precision(strategy: str, precision: str, zero: Mapping[str, Any]) -> None:
    taken = PRECISIONS[strategy]
    if precision not in taken:
        raise ConfigError(
            f"train.precision is {precision}, but sharding.strategy {strategy} takes "
            f"{_either(taken)}: use amp-o1, the same policy by torch"
        )
    stage = zero.get("stage", 0)
    if precision == "apex-o1" and stage > 0:
        raise ConfigError(
            f"train.precision is apex-o1 and zero_optimization.stage is {stage}, but Apex's amp "
            "works with stage 0 only: use train.precision=amp-o1 or ds_configs/zero0.json"
        )
    if precision == "amp-o1" and offload_device(zero, "offload_optimizer") == "nvme":
        raise ConfigError(
            "train.precision is amp-o1 and zero_optimization.offload_optimizer.device is nvme, but "
            "an overflow of one tensor has to skip the step of all, and on nvme they step one by "
            "one: use train.precision=bf16 or offload to cpu"
        )


def _check_compile(sharding: ShardingOptions, precision: str, zero: Mapping[str, Any]) -> None:
    if not sharding.compile:
        return
    where, because = None, ""
    if sharding.strategy == "fairscale" or zero.get("stage", 0) == 3:
        where, because = "stage is 3", "gathers weights layer by layer, which breaks a graph apart"
        if sharding.strategy == "fairscale":
            where = "sharding.strategy is fairscale"
    elif precision == "apex-o1" or sharding.syncbn == "apex":
        where, because = "Apex is in use", "replaces functions that a compiler looks through"
    if where:
        raise ConfigError(
            f"train.compile is true and {where}, which {because}: set train.compile=false, or use "
            "sharding.strategy=fsdp without Apex"
        )


def _check_momentum_on_host(strategy: str, optimizer: OptimizerOptions) -> None:
    if optimizer.momentum_on_host and strategy not in ("ddp", "fsdp", "hsdp"):
        raise ConfigError(
            f"optim.momentum_on_host is true, but sharding.strategy is {strategy}: it goes with "
            "ddp, fsdp and hsdp; zero has offload_optimizer in its ds_config"
        )


def _check_fused_backward(sharding: ShardingOptions, precision: str, world_size: int) -> None:
    strategy = sharding.strategy
    if strategy == "ddp" and world_size > 1:
        why = f"ddp averages gradients in buckets of many tensors over {_ranks(world_size)}"
    elif strategy not in ("ddp", "fsdp", "hsdp"):
        why = f"{strategy} reduces gradients by itself"
    elif sharding.gradient_accumulation > 1:
        why = (
            f"train.gradient_accumulation is {sharding.gradient_accumulation}, and a gradient is "
            "complete only after the last micro-batch"
        )
    elif precision in ("amp-o1", "apex-o1"):
        why = f"train.precision is {precision}, and an overflow anywhere has to skip the whole step"
    else:
        return
    raise ConfigError(
        f"optim.fuse_backward is true, but {why}: it goes with fsdp and hsdp, and ddp on one "
        "rank, in fp32 or bf16 without accumulation; set optim.fuse_backward=false"
    )


def steps_one_by_one(
    optimizer: OptimizerOptions, ds_config: Mapping[str, Any] | None
) -> str | None:
    """The option that makes a tensor step before all gradients are known; None if none does."""
    if optimizer.fuse_backward:
        return "optim.fuse_backward is true"
    zero = (ds_config or {}).get("zero_optimization", {})
    if offload_device(zero, "offload_optimizer") == "nvme":
        return "zero_optimization.offload_optimizer.device is nvme"
    return None


def resolve_max_nonfinite(asked: int | None, one_by_one: str | None) -> int:
    """Value of `train.max_nonfinite`; null means 3, or 1 if tensors step one by one.

    Args:
        asked: what the user gave, or None.
        one_by_one: from `steps_one_by_one`.
    """
    return asked or (1 if one_by_one else 3)


def check_skips(*, max_nonfinite: int | None, on_spike: str, one_by_one: str | None) -> None:
    """Refuses to skip steps whose first tensors have already moved.

    Args:
        max_nonfinite: `train.max_nonfinite`.
        on_spike: `train.on_spike`.
        one_by_one: from `steps_one_by_one`.

    Raises:
        ConfigError: one sentence with the key, its value and what to set instead.
    """
    if one_by_one and resolve_max_nonfinite(max_nonfinite, one_by_one) > 1:
        key, instead = f"train.max_nonfinite is {max_nonfinite}", "train.max_nonfinite=1"
    elif one_by_one and on_spike == "skip":
        key, instead = "train.on_spike is skip", "train.on_spike=rewind"
    else:
        return
    raise ConfigError(
        f"{key}, but {one_by_one}, and then tensors step one by one, some before another's "
        f"gradient is known not to be finite: set {instead}"
    )


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"


def _either(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
