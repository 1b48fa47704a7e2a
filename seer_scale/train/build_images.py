"""From a RunConfig to the images: crops, cache, collection, micro-batches, evaluation."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from seer_scale import distributed
from seer_scale.checkpoint import CheckpointReader
from seer_scale.config import RunConfig
from seer_scale.data import Cache, MicroBatchLoader, MultiCrop, Source, build_loader
from seer_scale.data.addresses import is_remote
from seer_scale.data.cache import default_folder
from seer_scale.data.loader import loader_bytes
from seer_scale.data.shard_manifest import is_manifest
from seer_scale.errors import ConfigError, DataError
from seer_scale.evaluation.during_training import DuringTraining
from seer_scale.train.collection import Collection
from seer_scale.train.state import TrainState


def transform_of(config: RunConfig) -> MultiCrop:
    """Builds the run's multi-crop augmentation."""
    data = config.data
    return MultiCrop(
        data.crop_sizes,
        data.crop_counts,
        data.scales,
        color_distortion=data.color_distortion,
        blur_probability=data.blur_probability,
    )


def memory_format_of(setting: str, device: torch.device) -> torch.memory_format:
    """Returns the memory format that `train.memory_format` means on `device`.

    The choice follows a table and is not measured at the start: two attempts of a run could measure
    differently, and a resumed run would no longer be equal bit for bit. docs/performance.md has the
    measurements behind the table.
    """
    faster = setting == "auto" and device.type == "cpu"
    return torch.channels_last if faster or setting == "channels_last" else torch.contiguous_format


def cache_of(config: RunConfig) -> Cache | None:
    """Opens the cache for copies of remote shards and for indexes; None for a folder of images."""
    data = config.data
    far = is_remote(data.path) or is_manifest(data.path)
    if data.cache_dir is None and not far and not _names_shards(data.path):
        return None
    folder = Path(data.cache_dir) if data.cache_dir else default_folder()
    try:
        return Cache(
            folder,
            int(data.cache_gib * 2**30),
            one_by_one=data.remote == "images"
            or (data.remote == "auto" and distributed.nodes() > 1),
        )
    except DataError:
        if far or data.cache_dir:
            raise
        return None  # local shards need no cache: each process then walks through their headers


def _names_shards(path: str) -> bool:
    """Returns whether a local path is that of tar shards, for whose indexes a cache is good."""
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            return any(entry.name.endswith(".tar") for entry in entries)
    return path.endswith(".tar") or any(sign in path for sign in "*?[{")


def collection_of(
    config: RunConfig,
    source: Source,
    reader: CheckpointReader | None,
    state: TrainState,
    say: Callable[[str], None],
) -> Collection:
    """Opens the collection that the run reads; see `Collection`.

    Args:
        config: configuration of the run.
        source: opened training data.
        reader: checkpoint to resume from, or None.
        state: progress of the run.
        say: tells the user something, on rank 0.
    """
    run_dir = Path(config.run.dir)
    cache = cache_of(config) if is_manifest(config.data.path) else None  # others never change
    return Collection(
        source,
        path=config.data.path,
        cache=cache,
        run_dir=run_dir,
        refresh=config.data.refresh_every,
        max_age_days=config.data.max_age_days,
        saved=state.collection,
        saved_run=reader.folder.parents[1] if reader else run_dir,
        cursor=state.samples_seen,
        say=say,
    )


def batches_of(config: RunConfig, collection: Collection, first_sample: int) -> MicroBatchLoader:
    """Opens this rank's micro-batches from the stream's position `first_sample` on."""
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


def loader_memory(config: RunConfig) -> int:
    """Computes the memory in bytes of one rank's loader; 0 if it has no process of its own."""
    data = config.data
    if not data.workers:
        return 0
    return loader_bytes(transform_of(config), config.train.micro_batch_size, data.prefetch)


def check_memory(config: RunConfig, ranks: int, free: int) -> None:
    """Refuses loaders that would hold more micro-batches than the machine has room for.

    Args:
        config: configuration of the run.
        ranks: ranks of this machine, each with a loader.
        free: memory of this machine or container in bytes that is free before the run.

    Raises:
        ConfigError: one sentence with the numbers and the keys that change them.
    """
    data, batch = config.data, config.train.micro_batch_size
    needed = ranks * loader_memory(config)
    if needed and needed > free:
        raise ConfigError(
            f"the loaders of this machine's {ranks} ranks would hold {needed / 2**30:.2f} GiB of "
            f"images, but {free / 2**30:.2f} GiB of memory are free: lower data.prefetch="
            f"{data.prefetch} or train.micro_batch_size={batch}, set data.workers=0, or give the "
            "machine or container more memory (docker run --memory)"
        )


def evaluation_of(config: RunConfig, device: torch.device) -> DuringTraining | None:
    """Builds the evaluation of checkpoints during the training; None if `eval.every` is null."""
    evaluation = config.eval
    if evaluation.every is None:
        return None
    assert evaluation.data is not None  # a validator of the section requires it
    return DuringTraining(
        evaluation.data,
        size=evaluation.size,
        k=evaluation.k,
        temperature=evaluation.temperature,
        images=evaluation.images,
        batch=evaluation.batch,
        prototypes=evaluation.prototypes,
        device=device,
        say=_say if distributed.is_main() else None,
    )


def _say(text: str) -> None:
    print(f"eval.data: {text}", file=sys.stderr, flush=True)
