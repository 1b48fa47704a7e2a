"""Pretrains a trunk: `deepspeed launch/pretrain.py --recipe demo --deepspeed_config FILE`.

Runs the same under deepspeed, torchrun and plain python, on CPU (gloo) and GPU (nccl).
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from pathlib import Path

from seer_scale.config import recipe
from seer_scale.config.ds_config import load_ds_config, resolve_ds_config
from seer_scale.config.shipped import RECIPES
from seer_scale.errors import REQUEUE_STATUS, UserError
from seer_scale.storage.disk_refusal import refusal


def run(arguments: recipe.Arguments) -> int:
    """Checks everything that can be checked, then trains; the exit status."""
    config = arguments.config
    is_main = os.environ.get("RANK", "0") == "0"
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    ds_config = None
    if config.sharding.deepspeed_config is not None:
        path = Path(config.sharding.deepspeed_config)
        ds_config = resolve_ds_config(
            load_ds_config(path),
            path=path,
            config=config,
            world_size=world_size,
        )

    # torch is first imported here: a mistyped key above is answered at once.
    import torch

    from seer_scale import checkpoint, distributed
    from seer_scale.data import open_source
    from seer_scale.distributed import failure
    from seer_scale.objectives import check_options
    from seer_scale.parallel.compatibility import check_sharding
    from seer_scale.performance.host_memory import keep_freed_memory
    from seer_scale.planner.advice import is_out_of_memory, out_of_memory
    from seer_scale.tracking.uri import resolve_uri
    from seer_scale.train import attempts, build
    from seer_scale.train.stopping import Stop

    check_sharding(
        config,
        ds_config,
        world_size=world_size,
        local_world_size=distributed.local_world_size(),
        cuda=torch.cuda.is_available(),
    )
    if config.tracking.enabled:
        resolve_uri(config.tracking.uri)
    crops = sum(config.data.crop_counts)
    check_options(config.objective.name, config.objective.options, crops=crops)
    build.transform_of(config)
    candidates = checkpoint.choose(arguments.resume, Path(config.run.dir), config.tracking.uri)
    if arguments.resume == "auto" and not candidates and is_main:
        print(
            f"--resume auto: {config.run.dir} holds no checkpoint, so this run starts afresh",
            file=sys.stderr,
        )
    source = open_source(config.data.path, build.cache_of(config))

    # Longer than the watchdog's patience, which names the ranks that are missing.
    device = distributed.init(max(30.0, 2 * config.run.hang_minutes), config.run.threads)
    if device.type == "cpu":
        keep_freed_memory(distributed.local_world_size())
    failure.watch()
    try:
        stop = attempts.train(
            config,
            ds_config=ds_config,
            source=source,
            resume=checkpoint.first_whole(candidates, warn),
            device=device,
            warn=warn,
        )
    except Exception as error:
        if isinstance(error, UserError) or refusal(error):  # the command tells it in a sentence
            failure.mark()
            raise
        if not is_out_of_memory(error):
            failure.end(error)
        sentence = out_of_memory(
            error,
            config,
            nodes=max(1, world_size // distributed.local_world_size()),
            gpus_per_node=distributed.local_world_size(),
            cuda=device.type == "cuda",
        )
        failure.mark()
        raise UserError(sentence) from None
    distributed.shutdown()
    return REQUEUE_STATUS if stop is Stop.REQUEUE else 0


def warn(text: str) -> None:
    """Tells the user something that is no error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def parser() -> ArgumentParser:
    """Of this command's line."""
    return recipe.parser(RECIPES)


def main(argv: list[str]) -> int:
    """The command line; the exit status, or a UserError."""
    return run(recipe.parse(argv, recipes=RECIPES))
