"""The actions of `seer-scale study`: forecast, run, report, write a SLURM job."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import xxhash

from seer_scale.config.batches import in_ranks
from seer_scale.config.shipped import RECIPES, find
from seer_scale.errors import ConfigError, UserError
from seer_scale.planner.plan import plan
from seer_scale.planner.planned import Plan
from seer_scale.storage.ownership import owned
from seer_scale.studies.report import write_report
from seer_scale.studies.results import row_of
from seer_scale.studies.run import is_finished, log_file, run_point
from seer_scale.studies.status import aligned, progress_of, seconds_left, status_table
from seer_scale.studies.stopping import StoppedError, StopSignals
from seer_scale.studies.study import Point, Study, points_of, read_study
from seer_scale.tracking.progress import duration
from seer_scale.tracking.quiet import quieten
from seer_scale.tracking.uri import resolve_uri

Say = Callable[[str], None]


def open_study(path: Path, out: Path | None) -> tuple[Study, Path, list[Point]]:
    """Reads a study and resolves all of its points.

    Args:
        path: study file; if it does not exist, the file of this name in the package.
        out: folder of the study; None means `runs/studies/<name>`.

    Returns:
        The study, its folder and its points.

    Raises:
        ConfigError: if the file or one of its points is wrong.
    """
    study = read_study(find(path))
    root = (out or Path("runs", "studies", study.name)).resolve()
    return study, root, points_of(study, root, RECIPES)


def forecast(study: Study, root: Path, points: Sequence[Point]) -> str:
    """Writes a table of all points: parameters, operations, memory per rank, hours and state.

    Raises:
        ConfigError: if a point does not fit the hardware.
    """
    lines = [["point", "parameters", "FLOPs", "memory/rank", "hours", "state"]]
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
    ranks = f"{in_ranks(study.processes)} of {study.hardware}"
    # The planner's speed of a CPU is an upper limit.
    counts = "counts at least" if study.hardware == "cpu" else "counts"
    return (
        f"{aligned(lines)}\n\n{len(points)} points on {ranks}: the planner {counts} "
        f"{_amount(total)} of training, without evaluations; folder: {root}"
    )


def _amount(hours: float) -> str:
    """A time in the unit that suits it."""
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.1f} seconds"


def run_all(study: Study, root: Path, points: Sequence[Point], say: Say) -> int:
    """Runs the unfinished points of a study and writes the report.

    Returns:
        Exit status: 0, or 1 if a point failed.

    Raises:
        ConfigError: if a point does not fit the hardware.
        StoppedError: if a signal stopped the study.
    """
    planned = _planned_seconds(study, points)  # refuses a point that does not fit
    failed = []
    # Runs inherit the mark: one that outlives a killed study still owns the study.
    with (
        owned(root, f"the study {root}", wait=True, inherited=True, say=say),
        _stoppable() as stop,
    ):
        for number, point in enumerate(points, start=1):
            where = f"[{number}/{len(points)}] {point.name}"
            if is_finished(study, root, point):
                say(f"{where}: finished before, {progress_of(study, root, point).words()}")
                continue
            say(f"{where}: {point.steps:,} steps, log {log_file(root, point)}")
            try:
                run_point(study, root, point, stop, say)
            except StoppedError:
                raise
            except UserError as error:
                failed.append(point.name)
                say(f"error: {error}")
            else:
                every = [progress_of(study, root, each) for each in points]
                left = duration(seconds_left(every, planned))
                say(f"{where}: finished, {every[number - 1].words()}; ETA of the study {left}")
        report(study, root, points, say)
    return int(bool(failed))


def status(study: Study, root: Path, points: Sequence[Point]) -> str:
    """Writes a table of all points: state, step, time, loss and top-1, and the time that is left.

    Raises:
        ConfigError: if a point does not fit the hardware.
    """
    every = [progress_of(study, root, point) for point in points]
    return status_table(every, seconds_left(every, _planned_seconds(study, points)))


def _planned_seconds(study: Study, points: Sequence[Point]) -> list[float]:
    """Seconds that the planner expects of each point."""
    return [cost.days * 24 * 3600 for cost in _costs(study, points)]


def run_one(study: Study, root: Path, points: Sequence[Point], number: int, say: Say) -> None:
    """Runs one point, as a task of a job array does; writes no report.

    Raises:
        ConfigError: if the study has no point of this number.
        UserError: if the point failed.
        StoppedError: if a signal stopped it.
    """
    if number >= len(points):
        raise ConfigError(f"--point {number}: the study has points 0 to {len(points) - 1}")
    with _stoppable() as stop:
        run_point(study, root, points[number], stop, say)


@contextmanager
def _stoppable() -> Iterator[StopSignals]:
    stop = StopSignals()
    try:
        yield stop
    except StoppedError as stopped:
        raise StoppedError(
            f"{stopped}: start it again with the same command, and it goes on"
        ) from None
    finally:
        stop.close()


def report(study: Study, root: Path, points: Sequence[Point], say: Say) -> Path:
    """Writes the report of the finished points, and logs it to MLflow if the runs are tracked.

    Returns:
        Path of the page.

    Raises:
        UserError: if no point is finished.
    """
    done = [point for point in points if is_finished(study, root, point)]
    if not done:
        raise UserError(
            f"no point of the study in {root} is finished, so there is nothing to report: run the "
            "study until a point is done"
        )
    rows = [
        row_of(
            study,
            root,
            point,
            parameters=cost.shape.trunk,
            flops_per_image=cost.flops.training,
            peak_flops=cost.hardware.peak(cost.batch.precision),
        )
        for point, cost in zip(done, _costs(study, done), strict=True)
    ]
    uri = resolve_uri(done[0].tracking_uri) if done[0].is_tracked else None
    missing = [point.name for point in points if point not in done]
    web = uri if uri and uri.startswith("http") else None
    page = write_report(study, rows, root / "report", tracking=web, missing=missing)
    say(f"report of {len(done)} of {len(points)} points: {page}")
    if uri:
        children = [row.run_id for row in rows if row.run_id]
        _keep(study, root, uri, children, page, finished=not missing, say=say)
    return page


def slurm_array(study: Study, path: Path, root: Path, points: Sequence[Point]) -> str:
    """Writes a batch script that runs every unfinished point as a task of a SLURM job array.

    Raises:
        UserError: if every point is finished.
    """
    left = [number for number, point in enumerate(points) if not is_finished(study, root, point)]
    if not left:
        raise UserError(
            f"every point of the study in {root} is finished: use --report for the page"
        )
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
        "# Add what your cluster needs: partition, account, time, --signal.\n"
        f"exec {shlex.join(command)} --point $SLURM_ARRAY_TASK_ID\n"
    )


def _costs(study: Study, points: Sequence[Point]) -> list[Plan]:
    """Plans every point.

    Raises:
        ConfigError: if a point does not fit the hardware; names the point.
    """
    costs = []
    for point in points:
        cost = plan(
            point.recipe,
            study.hardware,
            nodes=1,
            gpus_per_node=study.processes,
            overrides=point.overrides,
        )
        if not cost.fits:
            raise ConfigError(
                f"{point.name} needs {cost.memory.gib()['total']:.1f} GiB on each of "
                f"{study.processes} ranks of {study.hardware}, which has "
                f"{cost.hardware.usable_gib:.1f} GiB: leave that size out, use more processes, or "
                "set sharding or activation checkpointing under `set`"
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
    """Logs the report to the study's MLflow run, and nests the runs of the points below it."""
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
