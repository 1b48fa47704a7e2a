"""From a RunConfig to a trainer, in one order of building, and to a whole run.

Only this module and the `build_*` modules beside it know a RunConfig in this package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seer_scale import distributed
from seer_scale.checkpoint import CheckpointReader
from seer_scale.config import RunConfig
from seer_scale.data import Source, addresses
from seer_scale.distributed.watchdog import Watchdog
from seer_scale.models import seeded_values
from seer_scale.parallel.compile import check_compiler
from seer_scale.parallel.offload import uses_nvme
from seer_scale.performance.garbage import GarbageCollection
from seer_scale.tracking.progress import Progress
from seer_scale.train import attempts
from seer_scale.train.bad_samples import BadSamples
from seer_scale.train.build_engine import engine_of, max_nonfinite_of, recompute_plan_of
from seer_scale.train.build_images import (
    batches_of,
    cache_of,
    check_memory,
    collection_of,
    evaluation_of,
    memory_format_of,
    transform_of,
)
from seer_scale.train.build_model import learning_rate_of, model_of, objective_of
from seer_scale.train.build_reports import (
    announce,
    profiler_of,
    public,
    records_of,
    saves_of,
    telemetry_of,
    tracker_of,
    utilisation_of,
)
from seer_scale.train.image_stream import ImageStream
from seer_scale.train.phases import RANKS_ONLY, Phases
from seer_scale.train.rank_state import seed_rank
from seer_scale.train.restore import read_state, restore
from seer_scale.train.rewinds import skip_rewound_images
from seer_scale.train.settings import TrainSettings
from seer_scale.train.step_guard import StepGuard
from seer_scale.train.stopping import Stop, StopSignals
from seer_scale.train.trainer import Trainer

__all__ = [
    "batches_of",
    "cache_of",
    "check_memory",
    "learning_rate_of",
    "memory_format_of",
    "model_of",
    "objective_of",
    "profiler_of",
    "public",
    "saves_of",
    "train",
    "trainer_of",
    "transform_of",
    "utilisation_of",
]


def train(
    config: RunConfig,
    *,
    ds_config: dict[str, Any] | None,
    source: Source,
    resume: CheckpointReader | None,
    device: torch.device,
    warn: Callable[[str], None],
) -> Stop:
    """Trains to the last step, or to a signal; every rank calls this function.

    Args:
        config, ds_config, source, resume, device: arguments of `trainer_of`.
        warn: tells the user something.

    Returns:
        What stopped the run.

    Raises:
        UserError: as `attempts.run_attempts` does.
    """

    def open_trainer(reader: CheckpointReader | None) -> Trainer:
        return trainer_of(config, ds_config=ds_config, source=source, resume=reader, device=device)

    return attempts.run_attempts(
        open_trainer,
        resume,
        run_dir=Path(config.run.dir),
        max_rewinds=config.train.max_rewinds,
        device=device,
        warn=warn,
    )


def trainer_of(
    config: RunConfig,
    *,
    ds_config: dict[str, Any] | None,
    source: Source,
    resume: CheckpointReader | None,
    device: torch.device,
) -> Trainer:
    """Builds one rank's trainer; every rank calls this function.

    Whatever a user may have got wrong is checked before the tracker starts: a refused start must
    not touch a finished run's record.

    Args:
        config: configuration of the run.
        ds_config: resolved DeepSpeed configuration, for strategy `zero`.
        source: opened training data.
        resume: checkpoint to resume from, or None.
        device: device of this rank.
    """
    run_dir = Path(config.run.dir)
    stop_signals = StopSignals()
    if config.train.compile:
        check_compiler(device)
    seed_rank(config.run.seed, distributed.rank())
    objective = objective_of(config)
    state = read_state(resume, partial(model_of, config))
    plan = recompute_plan_of(config)
    evaluation = evaluation_of(config, device)
    tracker = tracker_of(config, state.step)

    values = resume.values if resume else partial(seeded_values, seed=config.run.seed)
    engine = engine_of(config, values, ds_config, device, plan)
    if resume:
        restore(resume, engine, objective, device, config.objective.name)

    progress = Progress(config.train.steps, state.step) if distributed.is_main() else None
    say = progress.say if progress else _silent
    collection = collection_of(config, source, resume, state, say)
    skip_rewound_images(run_dir, state, tracker)
    images = ImageStream(
        collection,
        state,
        partial(batches_of, config),
        device,
        memory_format_of(config.train.memory_format, device),
    )

    guard = StepGuard(
        engine.model,
        objective,
        mads=config.train.spike_mads,
        skip_spikes=config.train.on_spike == "skip",
        micro_batches=config.train.gradient_accumulation,
    )
    on_disk = uses_nvme((ds_config or {}).get("zero_optimization", {}))
    watchdog = Watchdog(
        60 * config.run.hang_minutes,
        records=run_dir / "flight_recorder",
        ranks_only=frozenset() if on_disk else RANKS_ONLY,
    )
    records = records_of(config, state.step)
    saves = saves_of(config, tracker, records, say, evaluation)
    telemetry = telemetry_of(config, device, plan, progress, records, tracker, say)
    announce(
        config,
        tracker,
        say,
        step=state.step,
        ds_config=ds_config,
        plan=plan,
        device=device,
        saved_config=resume.manifest.get("config", {}) if resume else None,
    )
    path = addresses.redact(config.data.path)
    tracker.log_dataset(
        path if addresses.is_remote(path) else str(Path(path).resolve()),
        digest=collection.in_use.version,
        images=len(collection.source),
        used_for="training",
    )
    return Trainer(
        settings_of(config, ds_config),
        run_dir=run_dir,
        device=device,
        state=state,
        objective=objective,
        engine=engine,
        images=images,
        guard=guard,
        bad_samples=BadSamples(config.data.max_bad_fraction),
        watchdog=watchdog,
        phase=Phases(device, watchdog, telemetry.profiler),
        saves=saves,
        telemetry=telemetry,
        garbage=GarbageCollection(config.run.gc_every),
        stop_signals=stop_signals,
    )


def settings_of(config: RunConfig, ds_config: dict[str, Any] | None) -> TrainSettings:
    """Collects the numbers and choices of the training loop."""
    train, ranks = config.train, distributed.world_size()
    made = train.micro_batch_size * train.gradient_accumulation * ranks
    assert made == train.global_batch, f"this configuration was not resolved for {ranks} ranks"
    return TrainSettings(
        steps=train.steps,
        accumulation=train.gradient_accumulation,
        global_batch=train.global_batch,
        learning_rate=partial(learning_rate_of, config),
        frozen_steps=config.optim.freeze_prototypes_steps,
        checkpoint_every=config.checkpoint.every,
        max_nonfinite=max_nonfinite_of(config, ds_config),
        rewind_on_spike=train.on_spike == "rewind",
        log_samples=config.run.log_samples,
    )


def _silent(text: str) -> None:
    """Says nothing: a rank other than 0 tells the user nothing."""
