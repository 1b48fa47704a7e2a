"""How far a study is, read from the folders of its points while it runs or afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seer_scale.storage.ownership import living_owner
from seer_scale.studies.results import final_loss, steps_of
from seer_scale.studies.run import evaluation_file, is_finished, is_trained
from seer_scale.studies.study import Point, Study
from seer_scale.tracking.progress import duration


@dataclass(frozen=True)
class Progress:
    """How far a point is.

    Attributes:
        point: the point.
        state: `finished`, `trained`, `running`, `stopped` or `to do`.
        step: its last step that is recorded.
        loss: mean loss of the last tenth of the recorded steps; None before the first.
        top1: top-1 of its first evaluation that has one, a share of 1; None before.
        seconds: time of its steps and evaluations.
    """

    point: Point
    state: str
    step: int
    loss: float | None
    top1: float | None
    seconds: float

    def words(self) -> str:
        """Time, loss and top-1, as far as they are known."""
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        top1 = "" if self.top1 is None else f", top-1 {100 * self.top1:.2f} %"
        return f"{duration(self.seconds)}{loss}{top1}"


def progress_of(study: Study, root: Path, point: Point) -> Progress:
    """Reads how far a point is."""
    lines = steps_of(point)
    seconds, top1 = sum(line["step_time"] for line in lines), None
    for task in study.evaluate.tasks if study.evaluate else {}:
        path = evaluation_file(root, point, task)
        if path.exists():
            report = json.loads(path.read_text())
            seconds += report.get("seconds", 0.0)
            top1 = report.get("metrics", {}).get("top1") if top1 is None else top1
    if is_finished(study, root, point):
        state = "finished"
    elif living_owner(point.folder) is not None:
        state = "running"
    elif is_trained(point):
        state = "trained"
    else:
        state = "stopped" if lines else "to do"
    loss = final_loss(lines) if lines else None
    return Progress(point, state, lines[-1]["step"] if lines else 0, loss, top1, seconds)


def seconds_left(every: Sequence[Progress], planned: Sequence[float]) -> float:
    """Estimates the time that the rest of a study takes.

    What the planner expects of the rest is scaled by how long the steps so far took.

    Args:
        every: progress of all points.
        planned: seconds that the planner expects of each point.
    """
    shares = [min(1.0, progress.step / progress.point.steps) for progress in every]
    done = sum(share * seconds for share, seconds in zip(shares, planned, strict=True))
    took = sum(progress.seconds for progress in every)
    left = sum((1 - share) * seconds for share, seconds in zip(shares, planned, strict=True))
    return left * took / done if done else left


def status_table(every: Sequence[Progress], left: float) -> str:
    """Formats the progress of all points, and the time that is left.

    Args:
        every: progress of all points.
        left: seconds, from `seconds_left`.
    """
    rows = [("point", "state", "step", "time", "loss", "top-1")]
    rows += [
        (
            progress.point.name,
            progress.state,
            f"{progress.step:,}/{progress.point.steps:,}",
            duration(progress.seconds),
            "" if progress.loss is None else f"{progress.loss:.4f}",
            "" if progress.top1 is None else f"{100 * progress.top1:.2f} %",
        )
        for progress in every
    ]
    finished = sum(progress.state == "finished" for progress in every)
    return f"{aligned(rows)}\n\n{finished} of {len(every)} points finished; ETA {duration(left)}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows of cells as a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
