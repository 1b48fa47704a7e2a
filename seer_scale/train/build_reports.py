"""From a RunConfig to a run's reports: tracker, records, checkpoints, metrics, announcement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from seer_scale import distributed
from seer_scale.config import RunConfig, recipe
from seer_scale.data import addresses
from seer_scale.errors import ConfigError
from seer_scale.evaluation.during_training import DuringTraining
from seer_scale.models.regnet import trunk_config
from seer_scale.parallel.activation_budget import RecomputePlan
from seer_scale.performance.flops import count_flops
from seer_scale.performance.hardware import device_name, hardware_of
from seer_scale.performance.profiler import FOLDER as PROFILE
from seer_scale.performance.profiler import Profiler
from seer_scale.performance.shape import regions
from seer_scale.performance.utilisation import Utilisation
from seer_scale.tracking import NullTracker, Tracker, start_tracking
from seer_scale.tracking.progress import Progress
from seer_scale.tracking.records import Records
from seer_scale.tracking.uri import redact
from seer_scale.train.build_model import model_of
from seer_scale.train.saves import Saves, SaveSettings
from seer_scale.train.telemetry import Telemetry

RUN_ID_SECONDS = 30.0  # longest wait for a tracking server to name the run


def public(config: RunConfig) -> RunConfig:
    """Removes secrets from addresses, so that files, MLflow and the log may hold the result.

    `--recipe config.yaml` needs the credentials and signatures of data.path and eval.data again.
    Those of the tracking server may come from the environment instead.
    """
    data, evaluation, tracking = config.data, config.eval, config.tracking
    update = {
        "data": data.model_copy(update={"path": addresses.redact(data.path)}),
        "eval": evaluation.model_copy(
            update={"data": evaluation.data and addresses.redact(evaluation.data)}
        ),
        "tracking": tracking.model_copy(update={"uri": tracking.uri and redact(tracking.uri)}),
    }
    return config.model_copy(update=update)


def tracker_of(config: RunConfig, first_step: int) -> Tracker | NullTracker:
    """Starts tracking on rank 0, from `first_step` on; other ranks get one without effect."""
    tracking = config.tracking
    if not (tracking.enabled and distributed.is_main()):
        return NullTracker()
    assert tracking.registered_name is not None  # the recipe's parser fills it in
    run_dir = Path(config.run.dir)
    return start_tracking(
        run_dir,
        uri=tracking.uri,
        experiment=tracking.experiment,
        registered_name=tracking.registered_name,
        run_name=run_dir.name,
        system_metrics=tracking.system_metrics,
        first_step=first_step,
    )


def records_of(config: RunConfig, first_step: int) -> Records | None:
    """Opens the run folder's files on rank 0, from `first_step` on; None on other ranks."""
    if not distributed.is_main():
        return None
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    # Written before the records, which turn a folder into a run's: a full disk then leaves no run.
    (run_dir / "config.yaml").write_text(recipe.dump(public(config)))
    return Records(run_dir, first_step=first_step, log_samples=config.run.log_samples)


def saves_of(
    config: RunConfig,
    tracker: Tracker | NullTracker,
    records: Records | None,
    say: Callable[[str], None],
    evaluation: DuringTraining | None = None,
) -> Saves:
    """Opens the run's checkpoints; see `Saves`."""
    settings = SaveSettings(
        trunk=config.model.trunk,
        objective=config.objective.name,
        strategy=config.sharding.strategy,
        config=public(config).model_dump(mode="json"),
        last_step=config.train.steps,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        evaluate_every=config.eval.every,
        artifact=config.tracking.checkpoints,
        log_models=config.tracking.log_models,
    )
    folder = Path(config.run.dir) / "checkpoints"
    return Saves(folder, settings, tracker, records, say, evaluation)


def utilisation_of(
    config: RunConfig,
    device: torch.device,
    plan: RecomputePlan | None,
    say: Callable[[str], None],
) -> Utilisation | None:
    """Counts the run's operations against the device's peak; says so if the peak is unknown."""
    peak = _peak(config, device)
    if peak is None:
        say(
            f"no mfu: the peak of {device_name(device)} in train.precision="
            f"{config.train.precision} is not known; run.peak_tflops sets it"
        )
        return None
    model, data, sharding = config.model, config.data, config.sharding
    trunk = trunk_config(model.trunk)
    again = regions(
        sharding.activation_checkpointing,
        [stage.depth for stage in trunk.stages],
        sharding.checkpoint_groups,
        plan.recomputed if plan else frozenset(),
    )
    flops = count_flops(
        trunk,
        crop_sizes=data.crop_sizes,
        crop_counts=data.crop_counts,
        head_dims=model.head_dims,
        prototypes=model.prototypes,
        recomputed=[block for region in again for block in region],
    )
    return Utilisation(flops.training, flops.training + flops.recompute, peak)


def _peak(config: RunConfig, device: torch.device) -> float | None:
    """Returns the FLOP/s of this rank's device. A CPU's hardware profile is that of one core."""
    if config.run.peak_tflops is not None:
        return 1e12 * config.run.peak_tflops
    hardware = hardware_of(device_name(device))
    if hardware is None:
        return None
    try:
        peak = hardware.peak(config.train.precision)
    except ConfigError:  # the device only emulates the precision
        return None
    return peak * (torch.get_num_threads() if device.type == "cpu" else 1)


def profiler_of(
    config: RunConfig,
    device: torch.device,
    tracker: Tracker | NullTracker,
    say: Callable[[str], None],
) -> Profiler:
    """Builds the profiler of this rank; without effect on ranks that `profile.ranks` lacks."""

    def done(files: list[Path], summary: str) -> None:
        say(summary)
        for path in files:
            tracker.log_artifact(path, PROFILE)

    rank, profile = distributed.rank(), config.profile
    return Profiler(
        Path(config.run.dir) / PROFILE,
        profile.steps if rank in profile.ranks else None,
        rank=rank,
        device=device,
        done=done,
    )


def telemetry_of(
    config: RunConfig,
    device: torch.device,
    plan: RecomputePlan | None,
    progress: Progress | None,
    records: Records | None,
    tracker: Tracker | NullTracker,
    say: Callable[[str], None],
) -> Telemetry:
    """Builds the reports of a rank's trainer; see `Telemetry`."""
    return Telemetry(
        run_dir=Path(config.run.dir),
        device=device,
        global_batch=config.train.global_batch,
        settled_step=max(config.optim.warmup_steps, config.optim.freeze_prototypes_steps),
        progress=progress,
        records=records,
        tracker=tracker,
        utilisation=utilisation_of(config, device, plan, say),
        profiler=profiler_of(config, device, tracker, say),
    )


def announce(
    config: RunConfig,
    tracker: Tracker | NullTracker,
    say: Callable[[str], None],
    *,
    step: int,
    ds_config: Mapping[str, Any] | None,
    plan: RecomputePlan | None,
    device: torch.device,
    saved_config: Mapping[str, Any] | None,
) -> None:
    """Says what is about to run, and which values changed since the checkpoint.

    Every rank calls this function.

    Args:
        config: configuration of the run.
        tracker: receives the parameters and the configuration.
        say: tells the user something, on rank 0.
        step: step from which the run goes on.
        ds_config: resolved DeepSpeed configuration, for strategy `zero`.
        plan: blocks to recompute, if they were chosen for a memory budget.
        device: device of this rank.
        saved_config: configuration in the checkpoint from which the run resumes, or None.
    """
    run_id = distributed.broadcast_object(tracker.wait_for_run_id(RUN_ID_SECONDS))
    model = model_of(config, torch.device("meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    world_size, batch = distributed.world_size(), config.train.global_batch
    run_dir, tracking = Path(config.run.dir), config.tracking
    now = _flatten(public(config).model_dump(mode="json"))
    tracker.log_params(
        {**now, "world_size": world_size, "global_batch": batch, "parameters": parameters}
    )
    tracker.log_artifact(run_dir / "config.yaml")
    stage = ds_config["zero_optimization"]["stage"] if ds_config else ""
    say(
        f"{config.recipe}: {config.model.trunk}, {parameters / 1e6:.2f}M parameters, "
        f"{config.sharding.strategy}{stage}, {world_size} x {device.type}, "
        f"{batch} images a step, from step {step} to {config.train.steps}\n"
        f"run folder {run_dir}, MLflow run "
        f"{run_id or (_not_known(tracker.problem()) if tracking.enabled else 'off')}"
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
    saved = _flatten(saved_config)
    changed = [
        f"{key} {saved.get(key)} -> {value}"
        for key, value in now.items()
        # Keys of other sections that the checkpoint lacks are newer than the checkpoint.
        if (key in saved or key.startswith("objective."))
        and saved.get(key) != value
        and not key.startswith(("run.dir", "tracking."))
    ]
    if changed:
        say(f"resumed with values that differ from those in the checkpoint: {', '.join(changed)}")


def _not_known(problem: str | None) -> str:
    return f"not known yet ({problem})" if problem else "not known yet"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns {"a": {"b": 1}} into {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
