"""Combinations that cannot be: refused before a process group, a model or a folder exists.

`PRECISIONS` and `READ_BY` are the tables of docs/sharding.md; nothing a user sets is ignored.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer_scale.config.run_config import RunConfig, ShardingSection
from seer_scale.errors import ConfigError
from seer_scale.models.regnet import trunk_config
from seer_scale.parallel import apex, fairscale

# Strategy -> the precisions it takes.
PRECISIONS = {
    "ddp": ("fp32", "bf16", "amp-o1", "apex-o1"),
    "fsdp": ("fp32", "bf16", "amp-o1"),
    "hsdp": ("fp32", "bf16", "amp-o1"),
    "zero": ("fp32", "bf16", "amp-o1", "apex-o1"),  # apex-o1: stage 0 only
    "fairscale": ("fp32", "bf16", "amp-o1"),
}
# Key of `sharding` -> the strategies that read it.
READ_BY = {
    "shard_size": ("hsdp",),
    "reshard_after_forward": ("fsdp", "hsdp", "fairscale"),
    "prefetch": ("fsdp", "hsdp"),
    "unit_parameters": ("fsdp", "hsdp", "fairscale"),
}


def check_sharding(
    config: RunConfig,
    ds_config: Mapping[str, Any] | None,
    *,
    world_size: int,
    local_world_size: int,
    cuda: bool,
) -> None:
    """Refuses what cannot be trained, or not exactly.

    Args:
        config: of the run.
        ds_config: resolved DeepSpeed configuration, for strategy `zero`.
        world_size: ranks of the run.
        local_world_size: ranks of a node.
        cuda: whether the ranks have GPUs.

    Raises:
        ConfigError: one sentence with the key, its value, what is allowed and what to do.
    """
    zero = (ds_config or {}).get("zero_optimization", {})
    _check_groups(config, world_size)
    _check_profile(config, world_size)
    _check_shards(config, world_size, local_world_size)
    _check_extras(config, cuda=cuda)
    _check_precision(config, zero)
    _check_compile(config, zero)
    _check_fused_backward(config, world_size)
    _check_skips(config, ds_config)
    _check_offload(config, zero)


def _check_groups(config: RunConfig, world_size: int) -> None:
    sharding, trunk = config.sharding, config.model.trunk
    if sharding.sync_bn_group_size > world_size:
        raise ConfigError(
            f"sharding.sync_bn_group_size is {sharding.sync_bn_group_size}, but the run has "
            f"{_ranks(world_size)}: set it to {world_size} or less, 0 for all or -1 for a node's"
        )
    stages, groups = len(trunk_config(trunk).stages), sharding.checkpoint_groups
    if groups is not None and len(groups) != stages:
        raise ConfigError(
            f"sharding.checkpoint_groups has {len(groups)} lists, but {trunk} has {stages} "
            "stages: give one list per stage"
        )


def _check_profile(config: RunConfig, world_size: int) -> None:
    profile = config.profile
    if profile.steps is not None and max(profile.ranks) >= world_size:
        raise ConfigError(
            f"profile.ranks is {list(profile.ranks)}, but the run has {_ranks(world_size)}: name "
            f"ranks from 0 to {world_size - 1}"
        )


def _check_shards(config: RunConfig, world_size: int, local_world_size: int) -> None:
    sharding = config.sharding
    for key, strategies in READ_BY.items():
        value, default = getattr(sharding, key), ShardingSection.model_fields[key].default
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


def _check_extras(config: RunConfig, *, cuda: bool) -> None:
    sharding, train = config.sharding, config.train
    if sharding.strategy == "fairscale" and config.model.align_channels > 1:
        raise ConfigError(
            f"model.align_channels is {config.model.align_channels}, but sharding.strategy is "
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
        if train.precision == "bf16":
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
    if train.precision == "apex-o1" and (reason := apex.missing_amp(cuda=cuda)):
        raise ConfigError(
            f"train.precision is apex-o1, but {reason}: use train.precision=amp-o1, the same "
            "policy by torch"
        )


def _check_precision(config: RunConfig, zero: Mapping[str, Any]) -> None:
    strategy, precision = config.sharding.strategy, config.train.precision
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
    if precision == "amp-o1" and _device(zero, "offload_optimizer") == "nvme":
        raise ConfigError(
            "train.precision is amp-o1 and zero_optimization.offload_optimizer.device is nvme, but "
            "an overflow of one tensor has to skip the step of all, and on nvme they step one by "
            "one: use train.precision=bf16 or offload to cpu"
        )


def _check_compile(config: RunConfig, zero: Mapping[str, Any]) -> None:
    if not config.train.compile:
        return
    where, because = None, ""
    if config.sharding.strategy == "fairscale" or zero.get("stage", 0) == 3:
        where, because = "stage is 3", "gathers weights layer by layer, which breaks a graph apart"
        if config.sharding.strategy == "fairscale":
            where = "sharding.strategy is fairscale"
    elif config.train.precision == "apex-o1" or config.sharding.syncbn == "apex":
        where, because = "Apex is in use", "replaces functions that a compiler looks through"
    if where:
        raise ConfigError(
            f"train.compile is true and {where}, which {because}: set train.compile=false, or use "
            "sharding.strategy=fsdp without Apex"
        )


def _check_fused_backward(config: RunConfig, world_size: int) -> None:
    optim, train, strategy = config.optim, config.train, config.sharding.strategy
    if optim.momentum_on_host and strategy not in ("ddp", "fsdp", "hsdp"):
        raise ConfigError(
            f"optim.momentum_on_host is true, but sharding.strategy is {strategy}: it goes with "
            "ddp, fsdp and hsdp; zero has offload_optimizer in its ds_config"
        )
    if not optim.fuse_backward:
        return
    if strategy == "ddp" and world_size > 1:
        why = f"ddp averages gradients in buckets of many tensors over {_ranks(world_size)}"
    elif strategy not in ("ddp", "fsdp", "hsdp"):
        why = f"{strategy} reduces gradients by itself"
    elif train.gradient_accumulation > 1:
        why = (
            f"train.gradient_accumulation is {train.gradient_accumulation}, and a gradient is "
            "complete only after the last micro-batch"
        )
    elif train.precision in ("amp-o1", "apex-o1"):
        why = (
            f"train.precision is {train.precision}, and an overflow anywhere has to skip the "
            "whole step"
        )
    else:
        return
    raise ConfigError(
        f"optim.fuse_backward is true, but {why}: it goes with fsdp and hsdp, and ddp on one "
        "rank, in fp32 or bf16 without accumulation; set optim.fuse_backward=false"
    )


def steps_one_by_one(config: RunConfig, ds_config: Mapping[str, Any] | None) -> str | None:
    """What makes tensors step without a look at all the others; None if nothing does."""
    if config.optim.fuse_backward:
        return "optim.fuse_backward is true"
    zero = (ds_config or {}).get("zero_optimization", {})
    if _device(zero, "offload_optimizer") == "nvme":
        return "zero_optimization.offload_optimizer.device is nvme"
    return None


def max_nonfinite(config: RunConfig, ds_config: Mapping[str, Any] | None) -> int:
    """`train.max_nonfinite`, or what null means."""
    return config.train.max_nonfinite or (1 if steps_one_by_one(config, ds_config) else 3)


def _check_skips(config: RunConfig, ds_config: Mapping[str, Any] | None) -> None:
    train = config.train
    why = steps_one_by_one(config, ds_config)
    if why and max_nonfinite(config, ds_config) > 1:
        key, instead = f"train.max_nonfinite is {train.max_nonfinite}", "train.max_nonfinite=1"
    elif why and train.on_spike == "skip":
        key, instead = "train.on_spike is skip", "train.on_spike=rewind"
    else:
        return
    raise ConfigError(
        f"{key}, but {why}, and then tensors step one by one, some before another's gradient is "
        f"known not to be finite: set {instead}"
    )


def _check_offload(config: RunConfig, zero: Mapping[str, Any]) -> None:
    stage = zero.get("stage", 0)
    optimizer, parameters = _device(zero, "offload_optimizer"), _device(zero, "offload_param")
    path = config.sharding.deepspeed_config
    if optimizer != "none" and stage == 0:
        raise ConfigError(
            f"{path}: zero_optimization.offload_optimizer is given, but "
            "zero_optimization.stage is 0, which offloads nothing: use stage 1, 2 or 3"
        )
    if parameters != "none" and stage < 3:
        raise ConfigError(
            f"{path}: zero_optimization.offload_param is given, but zero_optimization.stage is "
            f"{stage}, and only stage 3 partitions parameters: use stage 3"
        )
    if optimizer == "nvme" and stage < 3:
        raise ConfigError(
            f"{path}: zero_optimization.offload_optimizer.device is nvme, but "
            f"zero_optimization.stage is {stage}, and only stage 3 uses nvme: use stage 3 or cpu"
        )
    for section in ("offload_optimizer", "offload_param"):
        if _device(zero, section) == "nvme":
            _check_nvme(path, section, zero[section].get("nvme_path"))


def _check_nvme(path: str | None, section: str, folder: Any) -> None:
    key = f"{path}: zero_optimization.{section}.nvme_path"
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"{key} is missing: name a folder on a fast local disk")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{key} is {folder}, but nothing can be written there ({error.strerror}): name a "
            "folder on a fast local disk"
        ) from None
    from seer_scale.parallel.zero import missing_for_nvme

    if reason := missing_for_nvme():
        raise ConfigError(f"{key} is {folder}, but {reason}: install it, or offload to cpu")


def _device(zero: Mapping[str, Any], section: str) -> str:
    return str((zero.get(section) or {}).get("device", "none"))


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"


def _either(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
