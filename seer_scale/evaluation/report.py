"""Report of an evaluation: a JSON file, and MLflow, under the run that made the model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seer_scale.errors import DataError, UserError
from seer_scale.storage.atomic import replaced_file
from seer_scale.tracking.quiet import quieten
from seer_scale.tracking.records import METRICS, keep_knn
from seer_scale.tracking.spool import FOLDER, SENT, SETTINGS, read_json
from seer_scale.tracking.uri import (
    answers,
    environment,
    one_line,
    redact,
    resolve_uri,
    with_credentials,
)

EXPERIMENT = "seer-scale-evaluation"
NO_MLFLOW = "none"
_REGISTRY = "models:/"
_STEP = re.compile(r"step_(\d+)")
_ABOVE = 4  # levels from the trunk in a checkpoint up to the folder of its run, at most


@dataclass(frozen=True)
class Origin:
    """MLflow run that a model comes from: server, run and step; None means unknown."""

    uri: str | None = None
    run_id: str | None = None
    step: int | None = None


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the JSON file in one step.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        with replaced_file(path, writers=2) as fresh:
            fresh.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}): name another file"
        ) from error


def keep_in_run(report: Mapping[str, Any], model: str) -> None:
    """Leaves the result of `knn` in the run that the model is from, where model cards find it.

    Args:
        report: content of the JSON file.
        model: source of the model as the user gave it.
    """
    run_dir = _run_folder(model) if report["task"] == "knn" else None
    if run_dir is None or (step := _step(Path(model), run_dir)) is None:
        return
    result = {"top1": report["metrics"]["top1"], "data": report["data"]}
    # A run that somebody else owns gives up its card, not the evaluation.
    with suppress(OSError):
        keep_knn(run_dir, step, {**result, "size": report["options"]["size"]})


def log_report(
    report: Mapping[str, Any],
    files: Sequence[Path],
    *,
    model: str,
    name: str,
    uri: str | None,
    say: Callable[[str], None],
) -> str | None:
    """Logs metrics as `eval/TASK/METRIC` and files as `evaluation/TASK/...`.

    A failure of MLflow is only a warning, since the JSON file has the result.

    Args:
        report: content of the JSON file.
        files: pictures and the JSON file.
        model: source of the model as the user gave it.
        name: name of a new run, for a model that comes from no run.
        uri: server; None means the server of the model's run, MLFLOW_TRACKING_URI or the default;
            `none` logs nothing.
        say: prints a line for the user.

    Returns:
        Id of the run, or None if nothing was logged.
    """
    if uri == NO_MLFLOW:
        return None
    task = str(report["task"])
    try:
        chosen = server_of(model, uri)
        if not answers(chosen):
            raise UserError(f"{redact(chosen)} does not answer")
        os.environ.update(environment(chosen))
        quieten()
        from seer_scale.tracking.mlflow_client import log_evaluation

        origin = find_origin(model, chosen)
        run_id = log_evaluation(
            os.environ["MLFLOW_TRACKING_URI"],
            run_id=origin.run_id,
            experiment=EXPERIMENT,
            run_name=name,
            params={key: str(report[key]) for key in ("task", "model", "data", "preset", "trunk")},
            metrics={f"eval/{task}/{key}": value for key, value in report["metrics"].items()},
            step=origin.step or 0,
            files=files,
            folder=f"evaluation/{task}",
            scratch=files[0].parent if files else Path(),
        )
    except Exception as error:  # no failure of MLflow may lose hours of evaluation
        say(f"warning: MLflow has not got the result, which is in the file: {one_line(error)}")
        return None
    say(f"logged under MLflow run {run_id} at {redact(chosen)}")
    return run_id


def find_origin(model: str, uri: str) -> Origin:
    """Finds the run that a model comes from; its id is known only if `uri` is the run's server.

    Raises:
        MlflowException: the registry does not answer, or has no such model.
    """
    if model.startswith(_REGISTRY):
        from seer_scale.tracking.mlflow_client import run_of_model

        run_id, step = run_of_model(model, os.environ.get("MLFLOW_TRACKING_URI", uri))
        return Origin(uri, run_id, step)
    run_dir = _run_folder(model)
    if run_dir is None:
        return Origin()
    sent = read_json(run_dir / FOLDER / SENT)
    known = sent.get("uri") == redact(uri)
    return Origin(uri, sent.get("run_id") if known else None, _step(Path(model), run_dir))


def server_of(model: str, uri: str | None) -> str:
    """Returns `uri`, or else the server of the model's tracked run, or else the default server."""
    if uri is None and (run_dir := _run_folder(model)) is not None:
        settings = read_json(run_dir / FOLDER / SETTINGS)
        if "uri" in settings:
            return with_credentials(str(settings["uri"]))
    return resolve_uri(uri)


def _run_folder(model: str) -> Path | None:
    """Returns the folder of the run that a local source belongs to, or None."""
    path = Path(model)
    if not path.exists():
        return None
    path = path.resolve()
    for folder in (path, *path.parents[:_ABOVE]):
        if (folder / FOLDER / SETTINGS).is_file() or (folder / METRICS).is_file():
            return folder
    return None


def _step(source: Path, run_dir: Path) -> int | None:
    """Returns the step of the source's checkpoint, or else of the newest checkpoint of the run."""
    inside = source.resolve().relative_to(run_dir)
    names = [*inside.parts, *sorted(p.name for p in (run_dir / "checkpoints").glob("step_*[0-9]"))]
    found = [int(match[1]) for name in names if (match := _STEP.fullmatch(name))]
    if not found:
        return None
    return found[0] if _STEP.search(str(inside)) else found[-1]
