"""The results of a study: one row of numbers per finished point."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seer_scale.studies.run import evaluation_file
from seer_scale.studies.study import Point, Study
from seer_scale.tracking import Tracker
from seer_scale.tracking.records import METRICS, read_lines

_LAST = 0.1  # the final loss is the mean over this share of the steps


@dataclass(frozen=True)
class Row:
    """The results of a finished point.

    Attributes:
        point: the point.
        parameters: number of parameters of the trunk.
        flops: operations of the whole training without recomputation; a multiplication and an
            addition count as two.
        loss: mean loss over the last tenth of the steps.
        rank_hours: hours of all steps times the number of ranks.
        images_per_second: images per second of all ranks, median over the steps.
        peak_memory_gib: peak memory of rank 0 in GiB.
        mfu: model FLOPs utilisation, a share of 1; None if the peak is unknown.
        evaluations: metrics by `task/metric`.
        run_id: id of the MLflow run; None if the run was not sent.
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
    """Reads the results of a finished point from its folders.

    Args:
        study: the study.
        root: folder of the study.
        point: the finished point.
        parameters: number of parameters of the trunk.
        flops_per_image: operations of the forward and backward pass of an image.
        peak_flops: peak operations per second of one rank's device; None if unknown.
    """
    lines = steps_of(point)
    speed = statistics.median(line["images_per_second"] for line in lines)
    evaluations: dict[str, float] = {}
    for task in study.evaluate.tasks if study.evaluate else {}:
        report = json.loads(evaluation_file(root, point, task).read_text())
        evaluations |= {f"{task}/{name}": value for name, value in report["metrics"].items()}
    return Row(
        point=point,
        parameters=parameters,
        flops=flops_per_image * point.images,
        loss=final_loss(lines),
        rank_hours=sum(line["step_time"] for line in lines) * study.processes / 3600,
        images_per_second=speed,
        peak_memory_gib=max(line["peak_memory_gib"] for line in lines),
        mfu=peak_flops and flops_per_image * speed / (study.processes * peak_flops),
        evaluations=evaluations,
        run_id=Tracker(point.folder).run_id,
    )


def steps_of(point: Point) -> list[dict[str, Any]]:
    """Reads the recorded steps of a point, without the lines of evaluations."""
    return [line for line in read_lines(point.folder / METRICS) if "loss" in line]


def final_loss(steps: Sequence[Mapping[str, Any]]) -> float:
    """Averages the loss over the last tenth of at least one step."""
    return statistics.fmean(step["loss"] for step in steps[-max(1, int(_LAST * len(steps))) :])
