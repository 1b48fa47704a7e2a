"""A run from here to its end: attempts, each resumed from the last checkpoint after a rewind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from seer_scale import distributed
from seer_scale.checkpoint import CheckpointReader, first_whole, list_checkpoints
from seer_scale.config import RunConfig
from seer_scale.data import Source
from seer_scale.distributed import failure
from seer_scale.errors import UserError
from seer_scale.train.rewinds import Rewind, read_rewinds, record
from seer_scale.train.spikes import Spike
from seer_scale.train.stopping import Stop
from seer_scale.train.trainer import Trainer


def train(
    config: RunConfig,
    *,
    ds_config: dict[str, Any] | None,
    source: Source,
    resume: CheckpointReader | None,
    device: torch.device,
    warn: Callable[[str], None],
) -> Stop:
    """Trains to the last step, or to a signal; every rank calls it. Returns what stopped it.

    Args:
        config: the resolved configuration.
        ds_config: resolved DeepSpeed configuration, for strategy `zero`.
        source: the opened training data.
        resume: the checkpoint to go on from, or None.
        device: of this rank.
        warn: tells the user something.

    Raises:
        UserError: as `Trainer.train` does, and after `train.max_rewinds` to one checkpoint.
    """
    while True:
        trainer = Trainer(config, ds_config=ds_config, source=source, resume=resume, device=device)
        status, stop = "FAILED", Stop.NO
        try:
            stop = trainer.train()
            if stop is not Stop.REWIND:
                failure.unwatch()  # from here on ranks leave as they are done
            status = "FINISHED" if stop is Stop.NO else "KILLED"
        finally:
            trainer.close(status)
        if stop is not Stop.REWIND:
            return stop
        spike = trainer.spike
        assert spike is not None
        del trainer  # before the next one takes its memory
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        resume = _rewind(config, spike, warn)


def _rewind(
    config: RunConfig, spike: Spike, warn: Callable[[str], None]
) -> CheckpointReader | None:
    run_dir = Path(config.run.dir)
    reader = first_whole(list_checkpoints(run_dir / "checkpoints")[::-1], warn)
    state: dict[str, Any] = reader.manifest["state"] if reader else {}
    to_step, samples_seen = state.get("step", 0), state.get("samples_seen", 0)
    before = [r for r in read_rewinds(run_dir) if r.to_step == to_step]
    where = f"the checkpoint of step {to_step}" if reader else "its beginning"
    what = f"the loss of step {spike.step} is {spike.loss:.6g}, a spike above {spike.threshold:.6g}"
    if len(before) >= config.train.max_rewinds:
        raise UserError(
            f"{what}, and the run has gone back to {where} {len(before)} times "
            f"(train.max_rewinds={config.train.max_rewinds}): try a lower optim.lr or "
            "optim.base_lr, or train.on_spike=skip or continue, and --resume auto"
        )
    rewind = Rewind(
        spike.step, spike.loss, spike.threshold, to_step, samples_seen, spike.samples_seen
    )
    record(run_dir, rewind)
    if distributed.is_main():
        warn(
            f"{what}: the run goes back to {where} and on with the images from position "
            f"{spike.samples_seen} of the stream, leaving out those from {samples_seen}"
        )
    return reader
