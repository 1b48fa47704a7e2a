"""Finds the checkpoint of `--resume`: a path, the newest of a run, or of an MLflow run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from seer_scale import distributed
from seer_scale.checkpoint.manifest import MANIFEST, OtherFormatError, list_checkpoints, step_of
from seer_scale.checkpoint.reader import CheckpointReader, verify_together
from seer_scale.errors import CheckpointError, UserError
from seer_scale.tracking.records import METRICS

MLFLOW = "mlflow:"


def choose(resume: str | None, run_dir: Path, tracking_uri: str | None = None) -> list[Path]:
    """Lists the checkpoints that a run may start from, best first; none for a fresh run.

    Reads names only, and refuses to start afresh in the folder of another run. `first_whole` reads
    the files.

    Args:
        resume: what `--resume` says, if it is given; see `find`.
        run_dir: folder of the run that begins.
        tracking_uri: address of the MLflow server that knows the run of `mlflow:RUN_ID`.

    Raises:
        UserError: without `--resume`, if `run_dir` already holds a run.
        CheckpointError: if `--resume` names no checkpoint.
    """
    root = run_dir / "checkpoints"
    found: list[Path] = []
    if resume is not None and resume.startswith(MLFLOW):
        if os.environ.get("RANK", "0") != "0":
            return []  # rank 0 asks the server for all, and `first_whole` tells
        found = _of_mlflow_run(resume.removeprefix(MLFLOW), tracking_uri, root)
    elif resume is not None:
        found = find(resume, root)
    inside = bool(found) and found[0].resolve().is_relative_to(run_dir.resolve())
    saved = list_checkpoints(root)
    used = bool(saved) or (run_dir / METRICS).exists()
    if used and resume != "auto" and not inside:
        last = saved[-1].name if saved else "no checkpoint yet"
        raise UserError(
            f"run.dir={run_dir} already holds a run ({last}): go on with --resume auto or give "
            "another run.dir"
        )
    return found


def find(resume: str, root: Path) -> list[Path]:
    """Lists the checkpoints that `--resume` names, best first.

    Args:
        resume: `auto` for those in `root`, newest first; or the path of a checkpoint, which is
            meant alone, or of a run or its `checkpoints` folder.
        root: the run's own folder of checkpoints.

    Raises:
        CheckpointError: if a path holds no checkpoint.
    """
    if resume == "auto":
        return list_checkpoints(root)[::-1]
    return checkpoints_at(resume, option="--resume ", others=", mlflow:RUN_ID or auto")


def checkpoints_at(given: str, *, option: str = "", others: str = "") -> list[Path]:
    """Lists the checkpoints that a path names, best first.

    Args:
        given: path of a checkpoint, which is meant alone, or of a run or its `checkpoints` folder.
        option: what the user typed before the path, for messages.
        others: what the option takes besides paths, for messages.

    Raises:
        CheckpointError: if the path holds no checkpoint.
    """
    path, said = Path(given), f"{option}{given}"
    takes = f"give a run or one of its checkpoints (runs/NAME/checkpoints/step_XXXXXXXX){others}"
    if not path.exists():
        raise CheckpointError(f"{said}: there is no such folder; {takes}")
    if (path / MANIFEST).is_file() or step_of(path) is not None:
        return [path]
    found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(f"{said}: the folder holds no whole checkpoint; {takes}")
    return found[::-1]


def _of_mlflow_run(run_id: str, tracking_uri: str | None, root: Path) -> list[Path]:
    from seer_scale.tracking.quiet import quieten

    quieten()
    from seer_scale.tracking.mlflow_client import find_checkpoints
    from seer_scale.tracking.uri import resolve_uri

    return find_checkpoints(run_id, resolve_uri(tracking_uri), root)


def first_whole(candidates: list[Path], warn: Callable[[str], None]) -> CheckpointReader | None:
    """Opens the first checkpoint whose files match their checksums; every rank calls this.

    Every file that resuming needs is compared with its checksum; each rank reads a share of them.

    Args:
        candidates: best first.
        warn: is told of each that is passed over; on rank 0 only.

    Raises:
        CheckpointError: if there are candidates, and none is whole.
    """
    problem: str | None = None
    # Ranks may have listed the folder at different moments.
    candidates = distributed.broadcast_object(candidates)
    for folder in candidates:
        reader, problem = None, None
        try:
            part, parts = distributed.rank(), distributed.world_size()
            reader = CheckpointReader(folder, part=part, parts=parts)
        except OtherFormatError:
            raise  # passing it over would throw away what a later version has trained
        except CheckpointError as error:
            problem = str(error)
        # What one rank cannot read, all pass over.
        problem = next((text for text in distributed.gather_lists([problem]) if text), None)
        if problem is None:
            assert reader is not None
            problem = verify_together(reader)
            if problem is None:
                return reader
            problem = f"{folder} is damaged: {problem}"
        if folder != candidates[-1] and distributed.is_main():
            warn(f"{problem}; going back to the checkpoint before it")
    if not candidates:
        return None
    if len(candidates) > 1:
        problem = f"none of {len(candidates)} checkpoints is whole; the oldest: {problem}"
    raise CheckpointError(str(problem))
