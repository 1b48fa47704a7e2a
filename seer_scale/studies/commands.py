"""What `seer-scale study` does: forecast, run, report, or hand over to SLURM."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from seer_scale.config.shipped import RECIPES, find
from seer_scale.errors import ConfigError, UserError
from seer_scale.planner.plan import plan
from seer_scale.planner.planned import Plan
from seer_scale.studies.report import write_report
from seer_scale.studies.results import row_of
from seer_scale.studies.run import is_finished, run_point, sole_owner
from seer_scale.studies.study import Point, Study, points_of, read_study
from seer_scale.tracking.quiet import quieten
from seer_scale.tracking.uri import resolve_uri

Say = Callable[[str], None]


def open_study(path: Path, out: Path | None) -> tuple[Study, Path, list[Point]]:
    """Reads a study and resolves all of its points.

    Args:
        path: of the study file; one of that name that comes with the package, if it is not here.
        out: folder of the study; `runs/studies/<name>` unless given.

    Raises:
        ConfigError: whatever is wrong with it.
    """
    study = read_study(find(path))
    root = (out or Path("runs", "studies", study.name)).resolve()
    return study, root, points_of(study, root, RECIPES)


def forecast(study: Study, root: Path, points: Sequence[Point]) -> str:
    """A line for every point: what it is, what it needs and what it will take.

    Raises:
        ConfigError: if a point does not fit.
    """
    header = ["point", "parameters", "FLOPs", "memory/rank", "hours", "state"]
    lines = [header]
    total = 0.0
    for point, cost in zip(points, _costs(study, points), strict=True):
        hours = cost.days * 24
        total += hours
        lines.append(
            [
                point.name,
                f"{cost.shape.trunk / 1e6:.2f}M",
                f"{cost.flops.training * point.images:.2e}",
                f"{cost.memory.gib()['total']:.2f} GiB",
                f"{hours:.3f}",
                "finished" if is_finished(study, root, point) else "to do",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return (
        f"{text}\n\n{len(points)} points on {study.processes} ranks of {study.hardware}: "
        f"{total:.2f} hours of training by the planner, evaluations not counted; in {root}"
    )


def run_all(study: Study, root: Path, points: Sequence[Point], say: Say) -> int:
    """Runs what is left of a study and writes the report; 1 if a point could not be finished."""
    _costs(study, points)  # before anything is paid for
    failed = []
    with sole_owner(root, say):
        for number, point in enumerate(points, start=1):
            where = f"[{number}/{len(points)}] {point.name}"
            if is_finished(study, root, point):
                say(f"{where}: finished before")
                continue
            say(where)
            try:
                run_point(study, root, point, say)
            except UserError as error:
                failed.append(point.name)
                say(f"error: {error}")
        report(study, root, points, say)
    return int(bool(failed))


def run_one(study: Study, root: Path, points: Sequence[Point], number: int, say: Say) -> None:
    """Runs one point, for a job array; the report is written by whoever asks for it.

    Raises:
        ConfigError: if there is no such point.
        UserError: if it failed.
    """
    if number >= len(points):
        raise ConfigError(f"--point {number}: the study has points 0 to {len(points) - 1}")
    run_point(study, root, points[number], say)


def report(study: Study, root: Path, points: Sequence[Point], say: Say) -> Path:
    """Writes the report of the finished points and keeps it in MLflow.

    Raises:
        UserError: if none is finished.
    """
    done = [point for point in points if is_finished(study, root, point)]
    if not done:
        raise UserError(f"no point of the study in {root} is finished: there is nothing to report")
    rows = [
        row_of(
            study,
            root,
            point,
            parameters=cost.shape.trunk,
            flops_per_image=cost.flops.training,
            peak_flops=cost.hardware.peak(cost.config.train.precision),
        )
        for point, cost in zip(done, _costs(study, done), strict=True)
    ]
    tracking = done[0].config.tracking
    uri = resolve_uri(tracking.uri) if tracking.enabled else None
    missing = [point.name for point in points if point not in done]
    web = uri if uri and uri.startswith("http") else None
    page = write_report(study, rows, root / "report", tracking=web, missing=missing)
    say(f"report of {len(done)} of {len(points)} points: {page}")
    if uri:
        children = [row.run_id for row in rows if row.run_id]
        _keep(study, root, uri, children, page, finished=not missing, say=say)
    return page


def slurm_array(study: Study, path: Path, root: Path, points: Sequence[Point]) -> str:
    """A batch script that runs every point that is left as a task of a job array."""
    left = [number for number, point in enumerate(points) if not is_finished(study, root, point)]
    if not left:
        raise UserError(f"every point of the study in {root} is finished: --report writes the page")
    command = [sys.executable, "-m", "seer_scale", "study", "--study", str(find(path).resolve())]
    command += ["--out", str(root)]
    return (
        "#!/bin/bash\n"
        f"#SBATCH --job-name={study.name}\n"
        f"#SBATCH --array={','.join(map(str, left))}\n"
        "#SBATCH --nodes=1\n"
        f"#SBATCH --gpus-per-node={study.processes}\n"
        "#SBATCH --requeue\n"
        f"#SBATCH --output={root}/slurm-%a.log\n"
        "# Adds to this what the cluster wants: partition, account, time, --signal.\n"
        f"exec {shlex.join(command)} --point $SLURM_ARRAY_TASK_ID\n"
    )


def _costs(study: Study, points: Sequence[Point]) -> list[Plan]:
    """What every point needs.

    Raises:
        ConfigError: naming a point that does not fit.
    """
    costs = []
    for point in points:
        cost = plan(
            point.config,
            study.hardware,
            nodes=1,
            gpus_per_node=study.processes,
            images=point.images,
        )
        if not cost.fits:
            raise ConfigError(
                f"{point.name} needs {cost.memory.gib()['total']:.1f} GiB on each of "
                f"{study.processes} ranks of {study.hardware}, which has "
                f"{cost.hardware.usable_gib:.1f} GiB: leave that size out, take more processes, or "
                "set sharding and activation checkpointing under `set`"
            )
        costs.append(cost)
    return costs


def _keep(
    study: Study,
    root: Path,
    uri: str,
    children: Sequence[str],
    page: Path,
    *,
    finished: bool,
    say: Say,
) -> None:
    quieten()
    from seer_scale.tracking.mlflow_client import log_study

    try:
        run_id = log_study(
            uri,
            experiment=study.name,
            name=study.name,
            identity=xxhash.xxh3_64_hexdigest(os.fsencode(root)),
            children=children,
            files=sorted(page.parent.iterdir()),
            finished=finished,
        )
    except UserError as error:
        say(f"warning: {error}")
    else:
        say(f"MLflow run of the study: {run_id}")
