"""Fills in DeepSpeed's JSON from the recipe: each number has one owner.

A file in `ds_configs/` says how to shard and communicate. Values that the recipe owns (batch sizes,
precision, clipping, the optimizer) are written here; a file that contradicts them is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer_scale.config import RunConfig
from seer_scale.config.schema import shown
from seer_scale.config.shipped import find
from seer_scale.errors import ConfigError, did_you_mean

# Sections that would take from the recipe what it owns, or that mean nothing here.
_PRECISION = "it would cast BatchNorm and the float32 state: set train.precision in the recipe"
_NOT_HERE = "a RegNet under Seer Scale has no use for it"
REFUSED = {
    "optimizer": "the optimizer is the recipe's (optim.*), so that LARC is exact at every stage",
    "scheduler": "the learning rate is the recipe's (optim.*), a pure function of the step",
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "amp": "DeepSpeed has dropped it: set train.precision=apex-o1 (or amp-o1) in the recipe",
    "data_types": _PRECISION,
    "activation_checkpointing": "set sharding.activation_checkpointing in the recipe",
    "data_efficiency": "the order of samples is the recipe's (run.seed)",
    "pipeline": _NOT_HERE,
    "tensor_parallel": _NOT_HERE,
    "expert_parallel": _NOT_HERE,
    "hybrid_engine": _NOT_HERE,
    "weight_quantization": _NOT_HERE,
}

# Top-level keys of DeepSpeed 0.19 that stay its own.
DEEPSPEED_KEYS = (
    "aio",
    "autotuning",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "dataloader_drop_last",
    "datastates_ckpt",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
)
ZERO_KEYS = (
    "stage",
    "allgather_bucket_size",
    "allgather_partitions",
    "compute_grad_norm",
    "contiguous_gradients",
    "enable_sanity_checks",
    "ignore_unused_parameters",
    "leaf_module",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "override_module_apply",
    "parameter_alignment",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_allgather_sequential",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
    "zenflow",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_weights",
)
# Types of the keys in zero_optimization that people set; DeepSpeed asks for the rest.
ZERO_INTEGERS = {  # key -> the smallest
    "allgather_bucket_size": 1,
    "reduce_bucket_size": 1,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "sub_group_size": 1,
}
ZERO_BOOLEANS = (
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_scatter",
    "round_robin_gradients",
    "zero_quantized_gradients",
    "zero_quantized_weights",
)
ZERO_OFFLOADS = ("offload_optimizer", "offload_param")
OFFLOAD_DEVICES = ("cpu", "nvme", "none")


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Reads the JSON object in a file, or in the shipped file of that name.

    Raises:
        ConfigError: no such file, not JSON (with line and column), not an object, or a key that
            is given twice.
    """
    try:
        content = find(path).read_bytes()
        # Windows' editors and shells begin a file with a mark of its encoding.
        text = content.decode(json.detect_encoding(content))
    except OSError as error:
        raise ConfigError(f"cannot read the DeepSpeed config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the DeepSpeed config {path} is not UTF-8 text") from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{path}: {name} is given {names.count(name)} times")
        return dict(pairs)

    try:
        raw = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{path} is not valid JSON: {error.msg} ({place})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets without end
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {shown(raw)}, but must hold an object of DeepSpeed's keys")
    return raw


def ds_config_of(config: RunConfig, world_size: int) -> dict[str, Any] | None:
    """Returns the complete DeepSpeed configuration of a run; None for other strategies than zero.

    Args:
        config: the run's configuration.
        world_size: ranks of the whole run.

    Raises:
        ConfigError: see `load_ds_config` and `resolve_ds_config`.
    """
    path = config.sharding.deepspeed_config
    if path is None:
        return None
    return resolve_ds_config(
        load_ds_config(path),
        path=path,
        micro_batch_size=config.train.micro_batch_size,
        gradient_accumulation=config.train.gradient_accumulation,
        world_size=world_size,
    )


def resolve_ds_config(
    raw: dict[str, Any],
    *,
    path: str | Path,
    micro_batch_size: int,
    gradient_accumulation: int,
    world_size: int,
) -> dict[str, Any]:
    """Returns the complete DeepSpeed configuration of a training; `raw` stays unchanged.

    Args:
        raw: content of the file.
        path: the file, for messages.
        micro_batch_size: images per rank and forward pass.
        gradient_accumulation: micro-batches per step.
        world_size: ranks of the whole run.

    Raises:
        ConfigError: a section that is the recipe's, a number that contradicts it, a key that
            DeepSpeed does not have, a stage other than 0 to 3, or another value of
            zero_optimization that has the wrong type.
    """
    owned = _owned(micro_batch_size, gradient_accumulation, world_size)
    known = (*owned, *REFUSED, *DEEPSPEED_KEYS)
    for key, value in raw.items():
        if key not in known:
            raise ConfigError(f"{path}: {key} is not a key of DeepSpeed{did_you_mean(key, known)}")
        if key in REFUSED and not _switched_off(value):
            raise ConfigError(f"{path}: {key} is refused: {REFUSED[key]}")
        if key in owned and value not in ("auto", owned[key][0]):
            number, owner = owned[key]
            raise ConfigError(
                f"{path}: {key} is {shown(value)}, but must be {shown(number)} ({owner}): leave it "
                f'out or set it to "auto"'
            )
    _check_zero(raw.get("zero_optimization"), path)
    kept = {key: value for key, value in raw.items() if key not in REFUSED}
    zero = dict(raw["zero_optimization"])
    if zero["stage"] in (1, 2) and not zero.keys() & {"offload_optimizer", "zenflow"}:
        # Our optimizer knows the norm; DeepSpeed's takes a collective per tensor.
        zero.setdefault("compute_grad_norm", False)
    numbers = {key: number for key, (number, _) in owned.items()}
    return {**kept, **numbers, "zero_optimization": zero}


def offload_device(zero: Mapping[str, Any], section: str) -> str:
    """Device of `offload_optimizer` or `offload_param` in `zero` (zero_optimization), or "none"."""
    return str((zero.get(section) or {}).get("device", "none"))


def _owned(micro: int, accumulation: int, world_size: int) -> dict[str, tuple[Any, str]]:
    """Returns, for each key, its value and the owner of the value in words."""
    ours = "Seer Scale brings its own optimizer"
    return {
        "train_micro_batch_size_per_gpu": (micro, f"train.micro_batch_size is {micro}"),
        "gradient_accumulation_steps": (
            accumulation,
            f"train.gradient_accumulation is {accumulation}",
        ),
        "train_batch_size": (
            micro * accumulation * world_size,
            f"train.micro_batch_size {micro} * train.gradient_accumulation {accumulation} * "
            f"{world_size} ranks",
        ),
        "gradient_clipping": (0.0, "SEER clips nothing; unless told, DeepSpeed clips to 1.0"),
        "torch_autocast": (
            {"enabled": False},
            "train.precision is the model's own, the same under every strategy",
        ),
        "zero_allow_untested_optimizer": (True, ours),
        "zero_force_ds_cpu_optimizer": (False, ours),
        "managed_gradient_accumulation": (True, "the trainer steps after every micro-batch"),
        "gradient_allreduce_op": ("mean", "the loss is a mean over the global batch"),
    }


def _check_zero(zero: Any, path: str | Path) -> None:
    if not isinstance(zero, dict) or "stage" not in zero:
        raise ConfigError(f"{path}: zero_optimization.stage is missing: it must be 0, 1, 2 or 3")
    for key in zero:
        if key not in ZERO_KEYS:
            raise ConfigError(
                f"{path}: zero_optimization.{key} is not a key of DeepSpeed"
                f"{did_you_mean(key, ZERO_KEYS)}"
            )
    stage = zero["stage"]
    if type(stage) is not int or stage not in range(4):
        raise ConfigError(
            f"{path}: zero_optimization.stage is {shown(stage)}, but must be 0, 1, 2 or 3"
        )
    for key, value in zero.items():
        takes = _expected(key, value)
        if takes and value != "auto":  # which DeepSpeed reads as left out
            raise ConfigError(
                f"{path}: zero_optimization.{key} is {shown(value)}, but must be {takes}: correct "
                f"it, or leave it out for DeepSpeed's default"
            )


def _expected(key: str, value: Any) -> str:
    """Returns the allowed values in words, or '' if `value` is allowed."""
    if key in ZERO_INTEGERS:
        # JSON has no integer 5e7; DeepSpeed takes the whole number that it is.
        whole = type(value) is int or (isinstance(value, float) and value.is_integer())
        least = ZERO_INTEGERS[key]
        return "" if whole and value >= least else f"an integer >= {least}"
    if key in ZERO_BOOLEANS:
        return "" if isinstance(value, bool) else "true or false"
    if key in ZERO_OFFLOADS:
        section = value if isinstance(value, dict) else {}
        if section.get("device") not in OFFLOAD_DEVICES:
            return "an object whose device is cpu, nvme or none"
        # Norms of tensors on two devices would have to be brought together first.
        return "" if section.get("ratio", 1) == 1 else "an object whose ratio is 1, or without one"
    return ""


def _switched_off(value: Any) -> bool:
    return isinstance(value, dict) and value.get("enabled") is False
