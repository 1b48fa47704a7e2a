"""Runs the points of a study one after the other: launches, retries and evaluates each of them.

The folders of a study tell what is finished, so that a killed study repeats nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from seer_scale.checkpoint import list_checkpoints
from seer_scale.distributed.ports import free_port
from seer_scale.errors import REQUEUE_STATUS, UserError
from seer_scale.storage.ownership import living_owner
from seer_scale.studies.stopping import StoppedError, StopSignals
from seer_scale.studies.study import Point, Study
from seer_scale.tracking.children import package_environment

_POLL_S = 0.5
_SHOWN_LINES = 3  # last lines of a launcher's output that an error message shows


def is_trained(point: Point) -> bool:
    """Whether the run of a point has the checkpoint of its last step."""
    folder = point.folder / "checkpoints"
    last = f"step_{point.steps:08d}"
    return any(saved.name == last for saved in list_checkpoints(folder))


def evaluation_file(root: Path, point: Point, task: str) -> Path:
    """Path of the JSON file with the result of a task on a point."""
    return root / "evaluations" / point.name / f"{task}.json"


def log_file(root: Path, point: Point) -> Path:
    """Path of the output of a point's commands."""
    return root / "logs" / f"{point.name}.log"


def missing_evaluations(study: Study, root: Path, point: Point) -> list[str]:
    """Names of the tasks whose results of a point are missing."""
    tasks = study.evaluate.tasks if study.evaluate else {}
    return [task for task in tasks if not evaluation_file(root, point, task).exists()]


def is_finished(study: Study, root: Path, point: Point) -> bool:
    """Whether a point is trained and evaluated."""
    return is_trained(point) and not missing_evaluations(study, root, point)


def run_point(
    study: Study, root: Path, point: Point, stop: StopSignals, say: Callable[[str], None]
) -> None:
    """Trains and evaluates a point; skips what is finished.

    Args:
        study: the study.
        root: folder of the study.
        point: the point to run.
        stop: signals that ask the study to stop.
        say: prints a line for the user.

    Raises:
        StoppedError: if the study was asked to stop; the command has ended.
        UserError: if a command of the point failed `study.retries` + 1 times.
    """
    log = log_file(root, point)
    if not is_trained(point):
        command = [*_launcher(study), "pretrain", *point.arguments]
        command += ["--resume", "auto"]
        _persist(command, point.folder, log, study.retries, point, stop, say)
    for task in missing_evaluations(study, root, point):
        assert study.evaluate is not None
        out = evaluation_file(root, point, task)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "seer_scale", "evaluate", task),
            *("--model", str(point.folder), "--data", study.evaluate.data),
            *("--json", str(out), "--out", str(folder := out.parent / task)),
            *(f"{key}={value}" for key, value in study.evaluate.tasks[task].items()),
        ]
        _persist(command, folder, log, study.retries, point, stop, say)


def _launcher(study: Study) -> list[str]:
    if study.deepspeed_config:
        deepspeed = Path(sys.executable).with_name("deepspeed")
        port = ["--master_port", str(free_port())]
        ranks = ["--num_gpus", str(study.processes), "--no_local_rank", *port]
        return [str(deepspeed), "--quiet", *ranks, "--module", "seer_scale"]
    if study.processes == 1:
        return [sys.executable, "-m", "seer_scale"]
    ranks = ["--standalone", "--nproc-per-node", str(study.processes)]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", "seer_scale"]


def _persist(
    command: Sequence[str],
    folder: Path,
    log: Path,
    retries: int,
    point: Point,
    stop: StopSignals,
    say: Callable[[str], None],
) -> None:
    """Runs a command until it succeeds, at most `retries` + 1 times; its output goes to `log`.

    The command writes `folder`. One that a killed study left behind is waited for.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(retries + 1):
        _wait_for_leftover(folder, stop, say)
        stop.check()
        with log.open("ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            # The command inherits the study's mark, and so keeps other starts of the study away.
            process = subprocess.Popen(
                command,
                env=package_environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                close_fds=False,
            )
        status = _wait(process, folder, stop)
        if status == 0:
            return
        stop.check()
        if status == REQUEUE_STATUS:
            raise StoppedError(f"{point.name} was stopped by a signal and has saved")
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("error:")), None)
        words = said or " / ".join(lines[-_SHOWN_LINES:])
        left = retries - attempt
        say(
            f"{point.name} failed with status {status} ({words}); "
            + (f"starting it again, {left} retries left" if left else f"see {log}")
        )
    raise UserError(
        f"{point.name} failed {retries + 1} times: see {log}, then start the study again"
    )


def _wait(process: subprocess.Popen[bytes], folder: Path, stop: StopSignals) -> int:
    """Waits for the end of a command; once the study shall stop, asks the command to save and end.

    Launchers pass signals on in their own ways, or not at all. The owner of the folder is rank 0,
    and all ranks of a run stop when one is asked.
    """
    asked = ""
    while True:
        try:
            return process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            pass
        owner = living_owner(folder) if stop.received else None
        if owner is not None and owner.attempt != asked and owner.lives():
            os.kill(owner.pid, signal.SIGUSR1)
            asked = owner.attempt


def _wait_for_leftover(folder: Path, stop: StopSignals, say: Callable[[str], None]) -> None:
    told = False
    while not stop.received and (owner := living_owner(folder)) is not None:
        if not told:
            say(f"{folder} is still in use by {owner}: waiting until it ends")
        told = True
        time.sleep(_POLL_S)
