"""A run from its start to its end: attempts, each resumed from the last checkpoint by a rewind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from seer_scale import distributed
from seer_scale.checkpoint import CheckpointReader, first_whole, list_checkpoints
from seer_scale.distributed import failure
from seer_scale.errors import UserError
from seer_scale.train.rewinds import Rewind, read_rewinds, record
from seer_scale.train.spikes import Spike
from seer_scale.train.stopping import Stop
from seer_scale.train.trainer import Trainer


def run_attempts(
    open_trainer: Callable[[CheckpointReader | None], Trainer],
    resume: CheckpointReader | None,
    *,
    run_dir: Path,
    max_rewinds: int,
    device: torch.device,
    warn: Callable[[str], None],
) -> Stop:
    """Trains to the last step, or to a signal; every rank calls this function.

    Args:
        open_trainer: builds the trainer that starts at a checkpoint, or from nothing.
        resume: checkpoint to resume from, or None.
        run_dir: folder of the run.
        max_rewinds: rewinds to the same checkpoint before the run stops.
        device: device of this rank.
        warn: tells the user something.

    Returns:
        What stopped the run.

    Raises:
        UserError: as `Trainer.train` does, and after `max_rewinds` to one checkpoint.
    """
    while True:
        trainer = open_trainer(resume)
        status, stop = "FAILED", Stop.NO
        try:
            stop = trainer.train()
            if stop is not Stop.REWIND:
                failure.unwatch()  # from here on ranks end at different times
            status = "FINISHED" if stop is Stop.NO else "KILLED"
        finally:
            trainer.close(status)
        if stop is not Stop.REWIND:
            return stop
        spike = trainer.spike
        assert spike is not None
        del trainer  # the next trainer needs the memory
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        resume = _rewind(run_dir, max_rewinds, spike, warn)


def _rewind(
    run_dir: Path, max_rewinds: int, spike: Spike, warn: Callable[[str], None]
) -> CheckpointReader | None:
    reader = first_whole(list_checkpoints(run_dir / "checkpoints")[::-1], warn)
    state: dict[str, Any] = reader.manifest["state"] if reader else {}
    to_step, samples_seen = state.get("step", 0), state.get("samples_seen", 0)
    before = [r for r in read_rewinds(run_dir) if r.to_step == to_step]
    where = f"the checkpoint of step {to_step}" if reader else "its beginning"
    what = f"the loss of step {spike.step} is {spike.loss:.6g}, a spike above {spike.threshold:.6g}"
    if len(before) >= max_rewinds:
        raise UserError(
            f"{what}, and the run has gone back to {where} {len(before)} times "
            f"(train.max_rewinds={max_rewinds}): try a lower optim.lr or "
            "optim.base_lr, or train.on_spike=skip or continue, and --resume auto"
        )
    rewind = Rewind(
        spike.step, spike.loss, spike.threshold, to_step, samples_seen, spike.samples_seen
    )
    record(run_dir, rewind)
    if distributed.is_main():
        warn(
            f"{what}: the run goes back to {where} and continues with the images from position "
            f"{spike.samples_seen} of the stream; the images from {samples_seen} on are skipped"
        )
    return reader
