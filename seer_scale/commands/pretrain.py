"""Pretrains a trunk: `deepspeed launch/pretrain.py --recipe demo --deepspeed_config FILE`.

Runs the same under deepspeed, torchrun and plain python, on CPU (gloo) and GPU (nccl).
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from seer_scale.config import RunConfig, command_line, recipe
from seer_scale.config.batches import in_words
from seer_scale.config.ds_config import ds_config_of
from seer_scale.config.shipped import RECIPES
from seer_scale.errors import REQUEUE_STATUS, UserError, exit_with
from seer_scale.performance.cuda_allocator import let_segments_grow
from seer_scale.storage.disk_refusal import refusal
from seer_scale.storage.ownership import owned


def run(argv: list[str]) -> int:
    """Checks everything that can be checked, then trains; returns the exit status."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    arguments = recipe.parse(argv, recipes=RECIPES, ranks=world_size)
    config = arguments.config
    is_main = os.environ.get("RANK", "0") == "0"
    ds_config = ds_config_of(config, world_size)  # before torch: a mistake is answered at once
    let_segments_grow()
    import torch  # after what it reads has been set

    cuda = torch.cuda.is_available()
    if not cuda:
        _start_gpu()  # says why, before a check refuses what a CPU cannot do
    _check(config, ds_config, world_size)
    if arguments.dry_run:
        return _describe(arguments, world_size) if is_main else 0
    if cuda:
        _start_gpu()  # takes memory there: after every check, and not for a dry run
    run_dir = config.run.dir
    with owned(Path(run_dir), f"run.dir={run_dir}", lost=_lost) if is_main else nullcontext():
        return _train(argv, arguments, ds_config, world_size)


def _start_gpu() -> None:
    """Warns of GPUs that cannot be used, or not as planned."""
    from seer_scale.performance.gpu_start import start_gpu

    if reason := start_gpu():
        warn(reason)


def _check(config: RunConfig, ds_config: dict[str, Any] | None, world_size: int) -> None:
    """Refuses what cannot be trained here."""
    import torch

    from seer_scale import distributed
    from seer_scale.performance.free_memory import free_memory
    from seer_scale.train.build import check_memory
    from seer_scale.train.build_checks import check_start

    check_start(
        config,
        ds_config,
        world_size=world_size,
        local_world_size=distributed.local_world_size(),
        cuda=torch.cuda.is_available(),
    )
    # Before the ranks meet, so that none of them holds more than its program yet.
    check_memory(config, distributed.local_world_size(), free_memory())


def _describe(arguments: recipe.Arguments, world_size: int) -> int:
    """Prints the configuration as a recipe, with what the ranks make of it; returns 0."""
    from seer_scale.train.build import public

    config = public(arguments.config)
    print(f"# {in_words(config.train, world_size)}")
    for note in arguments.notes:
        print(f"# note: {note}")
    print(recipe.dump(config), end="")
    return 0


def _train(
    argv: list[str],
    arguments: recipe.Arguments,
    ds_config: dict[str, Any] | None,
    world_size: int,
) -> int:
    """Trains in a folder that rank 0 owns; returns the exit status."""
    from seer_scale import checkpoint, distributed
    from seer_scale.data import open_source
    from seer_scale.distributed import failure
    from seer_scale.performance.host_memory import keep_freed_memory
    from seer_scale.performance.memory_snapshot import MemorySnapshot
    from seer_scale.planner import plan
    from seer_scale.planner.advice import is_out_of_memory, out_of_memory
    from seer_scale.train import build
    from seer_scale.train.build_afterword import afterword, has_ended
    from seer_scale.train.stopping import Stop

    config = arguments.config
    candidates = checkpoint.choose(arguments.resume, Path(config.run.dir), config.tracking.uri)
    if arguments.resume == "auto" and not candidates:
        tell(
            f"--resume auto: {config.run.dir} holds no checkpoint, so this run starts from the "
            "beginning"
        )
    source = open_source(config.data.path, build.cache_of(config))
    for line in source.left_out.lines():
        tell(f"data.path: {line}")

    # Longer than the watchdog's patience, which names the ranks that are missing.
    device = distributed.init(max(30.0, 2 * config.run.hang_minutes), config.run.threads)
    if device.type == "cpu":
        keep_freed_memory(distributed.local_world_size())
    snapshot = MemorySnapshot(
        Path(config.run.dir) / "out_of_memory" / f"rank_{distributed.rank()}.pickle"
    )
    if device.type == "cuda":
        snapshot.attach()
    failure.watch()
    try:
        resume = checkpoint.first_whole(candidates, warn)
        if resume:  # a run that an earlier version started goes on with its own numbers
            saved = resume.manifest.get("config")
            own = recipe.parse(argv, recipes=RECIPES, ranks=world_size, saved=saved)
            if own != arguments:
                arguments, config = own, own.config
                ds_config = ds_config_of(config, world_size)
                _check(config, ds_config, world_size)
        for note in arguments.notes:
            tell(f"note: {note}")
        step = resume.manifest["step"] if resume else 0
        if done := step >= config.train.steps:
            tell(
                f"--resume {arguments.resume}: step {step} is done and train.steps is "
                f"{config.train.steps}, so nothing is left to train; a larger train.steps goes on, "
                "at the learning rates of the longer run"
            )
        stop = Stop.NO
        if not (done and distributed.broadcast_object(has_ended(config))):
            stop = build.train(
                config,
                ds_config=ds_config,
                source=source,
                resume=resume,
                device=device,
                warn=warn,
            )
    except Exception as error:
        if isinstance(error, UserError) or refusal(error):  # the command tells it in a sentence
            failure.mark()
            raise
        if not is_out_of_memory(error):
            failure.end(error)
        ranks = distributed.local_world_size()
        planner = partial(plan, config, nodes=max(1, world_size // ranks), gpus_per_node=ranks)
        sentence = out_of_memory(error, planner, cuda=device.type == "cuda") + snapshot.sentence()
        failure.mark()
        raise UserError(sentence) from None
    if stop is Stop.NO and distributed.is_main() and (said := afterword(config)):
        tell(said)
    distributed.shutdown()
    return REQUEUE_STATUS if stop is Stop.REQUEUE else 0


def _lost(sentence: str) -> NoReturn:
    exit_with(UserError(sentence))


def warn(text: str) -> None:
    """Prints a warning."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Tells the user something, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def parser() -> ArgumentParser:
    """Builds the argument parser."""
    return command_line.parser(RECIPES)


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status, or raises `UserError`."""
    return run(argv)
