"""Rewinds: returns to a checkpoint that continue with other images, kept in the run folder.

A rewind is one line of rewinds.jsonl and a resumed run. Every run that resumes from that checkpoint
reads the line and skips the images that led to the spike; so does a run that was killed in between.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seer_scale import distributed
from seer_scale.errors import CheckpointError
from seer_scale.tracking import NullTracker, Tracker
from seer_scale.tracking.records import read_lines
from seer_scale.train.state import TrainState

RECORD = "rewinds.jsonl"


@dataclass(frozen=True)
class Rewind:
    """A line of rewinds.jsonl.

    Attributes:
        step: step whose loss jumped.
        loss: loss of that step.
        threshold: threshold that the loss exceeded.
        to_step: step of the checkpoint to which the run went back; 0 for the run's beginning.
        samples_seen: position in the stream of images in that checkpoint.
        goes_on_at: position at which the run continued instead.
    """

    step: int
    loss: float
    threshold: float
    to_step: int
    samples_seen: int
    goes_on_at: int


def read_rewinds(run_dir: Path) -> list[Rewind]:
    """Reads a run's rewinds on rank 0, oldest first, for all ranks; every rank calls this.

    Raises:
        CheckpointError: if a line has other fields than `record` writes.
    """
    found: list[dict[str, Any]] = read_lines(run_dir / RECORD) if distributed.is_main() else []
    try:
        return [Rewind(**line) for line in distributed.broadcast_object(found)]
    except TypeError as error:
        raise CheckpointError(
            f"{run_dir / RECORD} is damaged ({error}): repair it, or delete it to go on with all "
            "images"
        ) from None


def record(run_dir: Path, rewind: Rewind) -> None:
    """Appends a line to rewinds.jsonl, on rank 0."""
    if distributed.is_main():
        with (run_dir / RECORD).open("a") as file:
            file.write(json.dumps(asdict(rewind)) + "\n")


def skip_rewound_images(run_dir: Path, state: TrainState, tracker: Tracker | NullTracker) -> None:
    """Moves `state` behind the images that the run's last rewind skips; every rank calls this.

    Args:
        run_dir: folder of the run.
        state: progress of the run, as a checkpoint holds it.
        tracker: receives the number of rewinds as a tag.
    """
    rewinds = read_rewinds(run_dir)
    state.samples_seen = position_after(rewinds, state.step, state.samples_seen)
    if rewinds:
        tracker.set_tags({"rewinds": len(rewinds)})


def position_after(rewinds: Sequence[Rewind], step: int, samples_seen: int) -> int:
    """Returns the position at which a run continues after a checkpoint.

    Args:
        rewinds: rewinds of the run, oldest first.
        step: step of the checkpoint.
        samples_seen: position in the stream of images in the checkpoint.
    """
    here = [r for r in rewinds if (r.to_step, r.samples_seen) == (step, samples_seen)]
    return here[-1].goes_on_at if here else samples_seen
