"""From a RunConfig to the checks that need neither the other ranks nor the images."""

from __future__ import annotations

from typing import Any

from seer_scale.config import RunConfig
from seer_scale.objectives import check_options
from seer_scale.tracking.uri import resolve_uri
from seer_scale.train.build_engine import check_run
from seer_scale.train.build_images import transform_of


def check_start(
    config: RunConfig,
    ds_config: dict[str, Any] | None,
    *,
    world_size: int,
    local_world_size: int,
    cuda: bool,
) -> None:
    """Refuses what cannot be trained, tracked or cropped, before the ranks meet.

    Args:
        config, ds_config, world_size, local_world_size, cuda: arguments of `check_run`.

    Raises:
        ConfigError: one sentence with the key, its value, what is allowed and what to do.
    """
    check_run(
        config,
        ds_config,
        world_size=world_size,
        local_world_size=local_world_size,
        cuda=cuda,
    )
    if config.tracking.enabled:
        resolve_uri(config.tracking.uri)
    crops = sum(config.data.crop_counts)
    check_options(config.objective.name, config.objective.options, crops=crops)
    transform_of(config)
