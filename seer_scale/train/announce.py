"""What a run says of itself when it begins: to the user, and to the tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from seer_scale import distributed
from seer_scale.config import RunConfig
from seer_scale.parallel.activation_budget import RecomputePlan
from seer_scale.tracking import NullTracker, Tracker
from seer_scale.train import build

RUN_ID_SECONDS = 30.0  # a tracking server that takes longer is waited for no more


def announce(
    config: RunConfig,
    tracker: Tracker | NullTracker,
    say: Callable[[str], None],
    *,
    step: int,
    plan: RecomputePlan | None,
    device: torch.device,
    saved_config: Mapping[str, Any] | None,
) -> None:
    """Says what is about to run, and what is not as it was saved; every rank calls it.

    Args:
        config: of the run.
        tracker: is given the parameters and the configuration.
        say: tells the user something, on rank 0.
        step: that the run goes on from.
        plan: which blocks are recomputed, where that was chosen for a budget.
        device: of this rank.
        saved_config: of the checkpoint that the run goes on from, or None.
    """
    run_id = distributed.broadcast_object(tracker.wait_for_run_id(RUN_ID_SECONDS))
    model = build.model_of(config, torch.device("meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    global_batch = build.global_batch(config)
    run_dir = Path(config.run.dir)
    tracking = config.tracking
    tracker.log_params(
        {
            **build.flatten(build.public(config).model_dump(mode="json")),
            "world_size": distributed.world_size(),
            "global_batch": global_batch,
            "parameters": parameters,
        }
    )
    tracker.log_artifact(run_dir / "config.yaml")
    say(
        f"{config.recipe}: {config.model.trunk}, {parameters / 1e6:.2f}M parameters, "
        f"{config.sharding.strategy}, {distributed.world_size()} x {device.type}, "
        f"{global_batch} images a step, from step {step} to {config.train.steps}\n"
        f"run folder {run_dir}, MLflow run "
        f"{run_id or ('not known yet' if tracking.enabled else 'off')}"
        + (
            f", trunks as {tracking.registered_name}"
            if tracking.enabled and tracking.log_models
            else ""
        )
    )
    if plan:
        say(str(plan))
    if saved_config is None:
        return
    saved = build.flatten(saved_config)
    now = build.flatten(build.public(config).model_dump(mode="json"))
    changed = [
        f"{key} {saved.get(key)} -> {value}"
        for key, value in now.items()
        # A key that is younger than the checkpoint has no other value there.
        if (key in saved or key.startswith("objective."))
        and saved.get(key) != value
        and not key.startswith(("run.dir", "tracking."))
    ]
    if changed:
        say(f"resumed with other values than it was saved with: {', '.join(changed)}")
