"""What the points of a study have come to, as rows of plain numbers."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from seer_scale.studies.run import evaluation_file
from seer_scale.studies.study import Point, Study
from seer_scale.tracking import Tracker
from seer_scale.tracking.records import METRICS, read_lines

_LAST = 0.1  # share of the steps that the final loss is averaged over


@dataclass(frozen=True)
class Row:
    """A finished point.

    Attributes:
        point: which one.
        parameters: of the trunk.
        flops: of the whole training, without recompute, a multiplication and an addition as two.
        loss: mean over the last tenth of the steps.
        rank_hours: time of all steps times the number of ranks, in hours.
        images_per_second: median over the steps.
        peak_memory_gib: of rank 0.
        mfu: share of the hardware's peak, None where the profile has no peak.
        evaluations: metrics by `task/metric`.
        run_id: in MLflow, None if the run was not sent.
    """

    point: Point
    parameters: int
    flops: float
    loss: float
    rank_hours: float
    images_per_second: float
    peak_memory_gib: float
    mfu: float | None
    evaluations: dict[str, float]
    run_id: str | None


def row_of(
    study: Study,
    root: Path,
    point: Point,
    *,
    parameters: int,
    flops_per_image: float,
    peak_flops: float | None,
) -> Row:
    """Reads what a finished point left in its folders.

    Args:
        study, root, point: as for `run_point`.
        parameters: of the trunk.
        flops_per_image: of training.
        peak_flops: of one rank, per second.
    """
    folder = Path(point.config.run.dir)
    lines = read_lines(folder / METRICS)
    tail = lines[-max(1, int(_LAST * len(lines))) :]
    speed = statistics.median(line["images_per_second"] for line in lines)
    evaluations: dict[str, float] = {}
    for task in study.evaluate.tasks if study.evaluate else {}:
        report = json.loads(evaluation_file(root, point, task).read_text())
        evaluations |= {f"{task}/{name}": value for name, value in report["metrics"].items()}
    return Row(
        point=point,
        parameters=parameters,
        flops=flops_per_image * point.images,
        loss=statistics.fmean(line["loss"] for line in tail),
        rank_hours=sum(line["step_time"] for line in lines) * study.processes / 3600,
        images_per_second=speed,
        peak_memory_gib=max(line["peak_memory_gib"] for line in lines),
        mfu=peak_flops and flops_per_image * speed / (study.processes * peak_flops),
        evaluations=evaluations,
        run_id=Tracker(folder).run_id,
    )
