"""The check of ZeRO's offload: to host memory or NVMe, by stage."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer_scale.config.ds_config import offload_device
from seer_scale.errors import ConfigError


def uses_nvme(zero: Mapping[str, Any]) -> bool:
    """Whether every step reads and writes a disk, by the section zero_optimization."""
    return "nvme" in (offload_device(zero, key) for key in ("offload_optimizer", "offload_param"))


def check_offload(zero: Mapping[str, Any], path: str | None) -> None:
    """Refuses an offload that the stage does not have, or that cannot be written on this machine.

    Args:
        zero: the section zero_optimization of a DeepSpeed configuration.
        path: file of that configuration, for messages.

    Raises:
        ConfigError: one sentence with the key, its value, what is allowed and what to do.
    """
    stage = zero.get("stage", 0)
    optimizer = offload_device(zero, "offload_optimizer")
    parameters = offload_device(zero, "offload_param")
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
        if offload_device(zero, section) == "nvme":
            _check_nvme(f"{path}: zero_optimization.{section}.nvme_path", zero[section])


def _check_nvme(key: str, section: Mapping[str, Any]) -> None:
    folder = section.get("nvme_path")
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
