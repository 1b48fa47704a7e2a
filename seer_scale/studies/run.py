"""Runs the points of a study one after the other: launched as a user would, retried, evaluated.

What is finished is read off the folders, so that a study that was killed repeats nothing.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import seer_scale
from seer_scale.checkpoint import list_checkpoints
from seer_scale.distributed.ports import free_port
from seer_scale.errors import UserError
from seer_scale.studies.study import Point, Study

_POLL_S = 1.0
_SHOWN_LINES = 3  # of a launcher's last words


def is_trained(point: Point) -> bool:
    """Whether the run has the checkpoint of its last step."""
    folder = Path(point.config.run.dir) / "checkpoints"
    last = f"step_{point.config.train.steps:08d}"
    return any(saved.name == last for saved in list_checkpoints(folder))


def evaluation_file(root: Path, point: Point, task: str) -> Path:
    """Where the result of a task on a point is kept."""
    return root / "evaluations" / point.name / f"{task}.json"


def missing_evaluations(study: Study, root: Path, point: Point) -> list[str]:
    """Tasks that a point has not been judged by yet."""
    tasks = study.evaluate.tasks if study.evaluate else {}
    return [task for task in tasks if not evaluation_file(root, point, task).exists()]


def is_finished(study: Study, root: Path, point: Point) -> bool:
    """Whether nothing is left to do for a point."""
    return is_trained(point) and not missing_evaluations(study, root, point)


def run_point(study: Study, root: Path, point: Point, say: Callable[[str], None]) -> None:
    """Trains and evaluates a point, as far as that has not been done.

    Args:
        study: the point is of.
        root: folder of the study.
        point: to be run.
        say: tells the user something.

    Raises:
        UserError: if it failed `study.retries` times more than once.
    """
    log = root / "logs" / f"{point.name}.log"
    if not is_trained(point):
        command = [*_launcher(study), "pretrain", *point.arguments]
        _persist([*command, "--resume", "auto"], log, study.retries, point, say)
    for task in missing_evaluations(study, root, point):
        assert study.evaluate is not None
        out = evaluation_file(root, point, task)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "seer_scale", "evaluate", task),
            *("--model", point.config.run.dir, "--data", study.evaluate.data),
            *("--json", str(out), "--out", str(out.parent / task)),
            *(f"{key}={value}" for key, value in study.evaluate.tasks[task].items()),
        ]
        _persist(command, log, study.retries, point, say)


@contextmanager
def sole_owner(root: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Waits until no other start of the study, nor a run that one left behind, is at work.

    Runs inherit the lock: if the study is killed and they are not, they still hold it.
    """
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    os.set_inheritable(descriptor, True)
    told = False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    say(f"another start of this study is still at work in {root}; waiting for it")
                told = True
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


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
    log: Path,
    retries: int,
    point: Point,
    say: Callable[[str], None],
) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    # A clone need not be installed.
    paths = [str(Path(seer_scale.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for attempt in range(retries + 1):
        with log.open("ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            # The study's lock goes along.
            done = subprocess.run(
                command,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                close_fds=False,
                check=False,
            )
        if done.returncode == 0:
            return
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("error:")), None)
        words = said or " / ".join(lines[-_SHOWN_LINES:])
        left = retries - attempt
        say(
            f"{point.name} failed with status {done.returncode} ({words}); "
            + (f"started again, {left} more times at most" if left else f"{log} has the rest")
        )
    raise UserError(f"{point.name} failed {retries + 1} times; {log} says why")
