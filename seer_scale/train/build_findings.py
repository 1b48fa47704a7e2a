"""From a RunConfig to findings: what this very run needs of this machine, and what is here.

`seer-scale doctor --run` prints them. The numbers are those of the run's own checks and of the
planner.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from seer_scale.checkpoint import choose
from seer_scale.config import RunConfig
from seer_scale.data import Source, open_source
from seer_scale.data.addresses import is_remote
from seer_scale.data.loader import most_micro_batches
from seer_scale.data.tars import MOST_OPEN_SHARDS, TarShards
from seer_scale.doctor import Finding
from seer_scale.doctor.clock import check_clock
from seer_scale.doctor.images import check_images
from seer_scale.doctor.locks import check_locks
from seer_scale.doctor.needs import (
    check_disk,
    check_memory,
    check_nccl_memory,
    check_open_files,
    check_port,
)
from seer_scale.doctor.storage import check_storage
from seer_scale.doctor.tracking import check_experiment, check_mlflow
from seer_scale.errors import ConfigError, UserError
from seer_scale.evaluation.datasets.labelled import open_labelled
from seer_scale.performance.free_memory import free_memory
from seer_scale.performance.hardware import device_name, hardware_of, load_hardware
from seer_scale.planner import plan
from seer_scale.planner.advice import GPU
from seer_scale.storage.ownership import living_owner
from seer_scale.tracking.uri import resolve_uri
from seer_scale.train.build_images import cache_of, loader_memory
from seer_scale.train.build_model import model_of

DISK_BYTES = 64 << 20  # that the measurement of the disk writes
PROGRAM = 2**30  # bytes of a rank before it holds a tensor: the interpreter with torch
LOWER = "lower train.micro_batch_size, or set sharding.activation_checkpointing=full"
FEWER = "make room, lower checkpoint.keep, or set run.dir to another disk"


def run_findings(
    config: RunConfig, resume: str | None, *, nodes: int, ranks: int, seconds: float
) -> Iterator[Finding]:
    """Yields what a run needs of this machine, one finding for each kind of thing.

    Args:
        config: the run's configuration, accepted by `check_start`.
        resume: what `--resume` says, if it is given.
        nodes: machines of the run.
        ranks: ranks on each machine.
        seconds: time that the images, and a server, may take to answer.
    """
    run_dir, cuda = Path(config.run.dir), torch.cuda.is_available()
    yield from _memory(config, nodes=nodes, ranks=ranks, cuda=cuda)
    yield check_nccl_memory(ranks, cuda=cuda)
    opening = partial(open_source, config.data.path, cache_of(config))
    images, source = check_images("data.path", opening, seconds)
    yield images
    if config.eval.every is not None and config.eval.data is not None:
        labelled = config.eval.data
        yield check_images(
            "eval.data", lambda: open_labelled(labelled, option="eval.data=").train.source, seconds
        )[0]
    ahead = most_micro_batches(config.data.prefetch) if config.data.workers else 1
    shards = MOST_OPEN_SHARDS if isinstance(source, TarShards) else config.data.workers
    yield check_open_files(nodes * ranks, ahead, shards)
    yield _folder(config, resume)
    yield from _disks(config, run_dir, source)
    yield check_locks(run_dir)
    yield check_port(int(os.environ.get("MASTER_PORT", 29500)), nodes * ranks)
    servers = [config.data.path] if config.data.path.startswith("http") else []
    if config.tracking.enabled:
        uri = resolve_uri(config.tracking.uri)
        (answer,) = check_mlflow(config.tracking.uri, min(seconds, 10.0))
        yield answer
        if answer.status == "ok":
            yield from check_experiment(config.tracking.uri, config.tracking.experiment)
        servers += [uri] if uri.startswith("http") else []
    yield check_clock(run_dir, servers, min(seconds, 10.0))


def checkpoint_bytes(config: RunConfig) -> tuple[int, int]:
    """Computes the bytes of a checkpoint, and those of its exported trunk.

    All ranks together write weights and momentum in float32, and buffers; rank 0 writes the trunk
    once more. A queue of the objective comes on top.
    """
    model = model_of(config, torch.device("meta"))
    trunk = sum(value.nbytes for value in model.trunk.state_dict().values())
    weights = sum(value.numel() for value in model.parameters())
    buffers = sum(value.nbytes for value in model.buffers())
    return 8 * weights + buffers + trunk, trunk


def _memory(config: RunConfig, *, nodes: int, ranks: int, cuda: bool) -> Iterator[Finding]:
    """Memory of this machine, and of its GPUs."""
    images = ranks * loader_memory(config)
    host = [("programs", float(ranks * PROGRAM)), ("images", float(images))]
    hardware = load_hardware("cpu")
    if cuda:
        device = torch.device("cuda", 0)
        hardware = hardware_of(device_name(device)) or load_hardware(GPU)
        # A save copies what the next update would change.
        host.append(("a save", checkpoint_bytes(config)[0] / nodes))
    try:
        needed = plan(config, hardware, nodes=nodes, gpus_per_node=ranks).memory.total
    except ConfigError as error:
        yield Finding("plan", "warn", "not known", f"the planner cannot say: {error}", LOWER)
    else:
        if cuda:
            free = min(torch.cuda.mem_get_info(index)[0] for index in range(ranks))
            context = hardware.reserved_gib * 2**30
            yield check_memory("GPU memory", [("tensors", needed), ("CUDA", context)], free, LOWER)
        else:
            host.append(("tensors", ranks * needed))
    knobs = (
        f"{LOWER}, lower data.prefetch={config.data.prefetch}, or give the container more memory"
    )
    yield check_memory("memory", host, free_memory(), knobs)


def _folder(config: RunConfig, resume: str | None) -> Finding:
    """Whether the run may start in its folder: nobody owns it, and what it holds is wanted."""
    name, run_dir = "run.dir", Path(config.run.dir)
    owner = living_owner(run_dir)
    if owner is not None:
        meaning = "one process at a time writes a run"
        return Finding(
            name, "fail", f"owned by {owner}", meaning, "end it, or name another run.dir"
        )
    try:
        found = choose(resume, run_dir, config.tracking.uri)
    except UserError as error:
        return Finding(name, "fail", "not free", str(error), "see docs/checkpoints.md")
    said = f"goes on from {found[0].name}" if found else "holds no run yet"
    return Finding(name, "ok", said, "the run can start there")


def _disks(config: RunConfig, run_dir: Path, source: Source | None) -> Iterator[Finding]:
    """Disks of checkpoints, of shards and of MLflow's models."""
    each, trunk = checkpoint_bytes(config)
    saving, steps = config.checkpoint, config.train.steps
    # One is written before an old one goes.
    count = 1 + saving.keep + (steps // saving.keep_every if saving.keep_every else 0)
    count = min(count, -(-steps // saving.every))
    present = _bytes_below(run_dir / "checkpoints")
    name = "checkpoints"
    yield check_disk(name, run_dir, count * each, present=present, advice=FEWER)
    yield from check_storage(run_dir, DISK_BYTES)
    cache = cache_of(config)
    if cache is not None and isinstance(source, TarShards):
        far = sum(shard.bytes for shard in source.shards if is_remote(shard.url))
        yield check_disk(
            "cache of shards",
            cache.folder,
            min(far, cache.limit_bytes),
            present=_bytes_below(cache.folder),
            advice="lower data.cache_gib, or set data.cache_dir to another disk",
        )
    tracking = config.tracking
    if not (tracking.enabled and tracking.log_models):
        return
    uri = resolve_uri(tracking.uri)
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        advice = "make room, set tracking.log_models=false, or raise checkpoint.every"
        saves = -(-steps // saving.every)
        yield check_disk("models in MLflow", folder, saves * trunk, present=0.0, advice=advice)


def _bytes_below(folder: Path) -> float:
    files = folder.rglob("*") if folder.is_dir() else []
    return float(sum(path.stat().st_size for path in files if path.is_file()))
