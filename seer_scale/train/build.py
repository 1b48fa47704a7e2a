"""From a RunConfig to the parts of a run: the only code below the trainer that knows its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from seer_scale import distributed
from seer_scale.config import RunConfig
from seer_scale.data import Cache, MicroBatchLoader, MultiCrop, Source, addresses, build_loader
from seer_scale.data.addresses import is_remote
from seer_scale.data.cache import default_folder
from seer_scale.data.shard_manifest import is_manifest
from seer_scale.errors import ConfigError
from seer_scale.evaluation.during_training import DuringTraining
from seer_scale.models import MultiCropModel, build_model
from seer_scale.models.regnet import trunk_config
from seer_scale.optim.schedules import learning_rate, scaled_lr, warmup_start
from seer_scale.parallel.activation_budget import RecomputePlan
from seer_scale.performance.flops import count_flops
from seer_scale.performance.hardware import device_name, hardware_of
from seer_scale.performance.profiler import FOLDER as PROFILE
from seer_scale.performance.profiler import Profiler
from seer_scale.performance.shape import regions
from seer_scale.performance.utilisation import Utilisation
from seer_scale.tracking import NullTracker, Tracker, start_tracking
from seer_scale.tracking.uri import redact
from seer_scale.train.collection import Collection, InUse


def global_batch(config: RunConfig) -> int:
    """Images per optimizer step, over all ranks and micro-batches."""
    train = config.train
    return train.micro_batch_size * train.gradient_accumulation * distributed.world_size()


def model_of(config: RunConfig, device: torch.device) -> MultiCropModel:
    """The run's model, without values."""
    model = config.model
    return build_model(
        model.trunk,
        head_dims=model.head_dims,
        head_batch_norm=model.head_batch_norm,
        prototypes=model.prototypes,
        device=device,
    )


def transform_of(config: RunConfig) -> MultiCrop:
    """The run's multi-crop augmentation."""
    data = config.data
    return MultiCrop(
        data.crop_sizes,
        data.crop_counts,
        data.scales,
        color_distortion=data.color_distortion,
        blur_probability=data.blur_probability,
    )


def memory_format_of(setting: str, device: torch.device) -> torch.memory_format:
    """What `train.memory_format` means on `device`.

    By table, not by trying: a choice that two attempts of a run could make differently would end
    the bitwise equality of a resumed run. docs/performance.md has the measurements.
    """
    faster = setting == "auto" and device.type == "cpu"
    return torch.channels_last if faster or setting == "channels_last" else torch.contiguous_format


def cache_of(config: RunConfig) -> Cache | None:
    """Where the run keeps copies of remote shards; None if it has none."""
    data = config.data
    if data.cache_dir is None and not is_remote(data.path) and not is_manifest(data.path):
        return None
    folder = Path(data.cache_dir) if data.cache_dir else default_folder()
    return Cache(folder, int(data.cache_gib * 2**30))


def collection_of(
    config: RunConfig,
    source: Source,
    *,
    saved: InUse | None,
    saved_run: Path,
    cursor: int,
    say: Callable[[str], None],
) -> Collection:
    """The collection the run reads from position `cursor` on; see `Collection`."""
    return Collection(
        source,
        path=config.data.path,
        cache=cache_of(config),
        run_dir=Path(config.run.dir),
        refresh=config.data.refresh_every,
        max_age_days=config.data.max_age_days,
        saved=saved,
        saved_run=saved_run,
        cursor=cursor,
        say=say,
    )


def batches_of(config: RunConfig, collection: Collection, first_sample: int) -> MicroBatchLoader:
    """This rank's micro-batches from the stream's position `first_sample` on."""
    return build_loader(
        collection.source,
        transform_of(config),
        seed=config.run.seed,
        micro_batch_size=config.train.micro_batch_size,
        gradient_accumulation=config.train.gradient_accumulation,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        first_sample=first_sample,
        origin=collection.in_use.origin,
        window=config.data.window,
        augment_on=config.data.augment_on,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )


def evaluation_of(config: RunConfig, device: torch.device) -> DuringTraining | None:
    """What judges checkpoints during the training; None if nothing does."""
    evaluation = config.eval
    if evaluation.every is None:
        return None
    assert evaluation.data is not None  # the configuration sees to it
    return DuringTraining(
        evaluation.data,
        size=evaluation.size,
        k=evaluation.k,
        temperature=evaluation.temperature,
        images=evaluation.images,
        batch=evaluation.batch,
        prototypes=evaluation.prototypes,
        device=device,
    )


def learning_rate_of(config: RunConfig, step: int) -> float:
    """Learning rate of step `step`, counted from 0."""
    optim = config.optim
    peak = optim.lr or scaled_lr(optim.base_lr, global_batch(config))
    end = peak * optim.end_lr_ratio
    return learning_rate(
        step,
        total_steps=config.train.steps,
        warmup_steps=optim.warmup_steps,
        start=warmup_start(peak, nodes=distributed.nodes(), floor=end),
        peak=peak,
        end=end,
        schedule=optim.schedule,
    )


def tracker_of(config: RunConfig, first_step: int) -> Tracker | NullTracker:
    """Tracking of the run on rank 0, from `first_step` on; no effect on other ranks."""
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


def utilisation_of(
    config: RunConfig,
    device: torch.device,
    plan: RecomputePlan | None,
    say: Callable[[str], None],
) -> Utilisation | None:
    """The run's operations against its devices' peak; None, and a sentence, if that is unknown."""
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
    """FLOP/s of this rank's device; a CPU's profile is that of one core."""
    if config.run.peak_tflops is not None:
        return 1e12 * config.run.peak_tflops
    hardware = hardware_of(device_name(device))
    if hardware is None:
        return None
    try:
        peak = hardware.peak(config.train.precision)
    except ConfigError:  # a precision that the device only emulates
        return None
    return peak * (torch.get_num_threads() if device.type == "cpu" else 1)


def profiler_of(
    config: RunConfig,
    device: torch.device,
    tracker: Tracker | NullTracker,
    say: Callable[[str], None],
) -> Profiler:
    """What profiles this rank; nothing on ranks that `profile.ranks` does not name."""

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


def public(config: RunConfig) -> RunConfig:
    """The configuration as files, MLflow and the log may hold it: no address has its secrets.

    Credentials and signatures of data.path and eval.data have to be given again to `--recipe
    config.yaml`; those of the tracking server come from the environment too.
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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
