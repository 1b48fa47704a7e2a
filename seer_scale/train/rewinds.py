"""Rewinds: going back to a checkpoint and on with other images, remembered in the run's folder.

A rewind is one line of rewinds.jsonl and a resumed run: whoever goes on from that checkpoint, a run
that was killed in between too, reads the line and leaves out the images that led to the spike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seer_scale import distributed
from seer_scale.errors import CheckpointError
from seer_scale.tracking.records import read_lines

RECORD = "rewinds.jsonl"


@dataclass(frozen=True)
class Rewind:
    """A line of rewinds.jsonl.

    Attributes:
        step: whose loss jumped.
        loss: of it.
        threshold: that it was above.
        to_step: of the checkpoint that the run went back to; 0 for its beginning.
        samples_seen: position of the stream in that checkpoint.
        goes_on_at: position that the run went on at instead.
    """

    step: int
    loss: float
    threshold: float
    to_step: int
    samples_seen: int
    goes_on_at: int


def read_rewinds(run_dir: Path) -> list[Rewind]:
    """The rewinds of a run, oldest first, as rank 0 reads them; every rank calls it.

    Raises:
        CheckpointError: if a line is not as `record` writes it.
    """
    found: list[dict[str, Any]] = read_lines(run_dir / RECORD) if distributed.is_main() else []
    try:
        return [Rewind(**line) for line in distributed.broadcast_object(found)]
    except TypeError as error:
        raise CheckpointError(
            f"{run_dir / RECORD} is damaged ({error}): mend it, or delete it to go on with all "
            "images"
        ) from None


def record(run_dir: Path, rewind: Rewind) -> None:
    """Adds a line, on rank 0."""
    if distributed.is_main():
        with (run_dir / RECORD).open("a") as file:
            file.write(json.dumps(asdict(rewind)) + "\n")


def position_after(rewinds: Sequence[Rewind], step: int, samples_seen: int) -> int:
    """Where a run goes on from a checkpoint: behind the images that its last rewind left out.

    Args:
        rewinds: of the run.
        step: of the checkpoint.
        samples_seen: position of the stream in it.
    """
    here = [r for r in rewinds if (r.to_step, r.samples_seen) == (step, samples_seen)]
    return here[-1].goes_on_at if here else samples_seen
