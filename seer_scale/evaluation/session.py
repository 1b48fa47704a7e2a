"""One evaluation from the source of the model to the report, run by every rank together."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from seer_scale import distributed
from seer_scale.convert.locating import locate
from seer_scale.distributed import failure
from seer_scale.errors import ConfigError, UserError
from seer_scale.evaluation.feature_store import weights_digest
from seer_scale.evaluation.maps import name_of
from seer_scale.evaluation.options import TaskOptions
from seer_scale.evaluation.report import keep_in_run, log_report, write_report
from seer_scale.evaluation.task import Context, Result
from seer_scale.models import build_trunk, initialise
from seer_scale.performance.cuda_allocator import let_segments_grow
from seer_scale.performance.gpu_start import start_gpu
from seer_scale.serving import versions
from seer_scale.storage.disk_refusal import refusal
from seer_scale.storage.ownership import owned

RANDOM = "random:"
TIMEOUT_MINUTES = 600.0  # the other ranks wait while one rank solves or draws


@dataclass(frozen=True)
class Request:
    """One evaluation as the user asked for it.

    Attributes:
        task: name of the task.
        options: options of the task.
        model: source of the trunk, see `open_model`.
        data: path or address of the data.
        labels: file of labels that replaces the labels of the data's layout.
        preset: name of the preset in `options`, for the report.
        json: further file for the report.
        out: folder of the evaluation; None means `runs/evaluations/TASK-DIGEST`.
        features: folder that keeps features for other evaluations.
        mlflow_uri: see `log_report`.
    """

    task: str
    options: TaskOptions
    model: str
    data: str
    labels: str | None
    preset: str | None
    json: Path | None
    out: Path | None
    features: Path | None
    mlflow_uri: str | None


def evaluate(request: Request) -> None:
    """Loads the model, runs the task on every rank, and reports on rank 0.

    Raises:
        UserError: whatever is wrong with the model, the data or the options, and if another
            evaluation runs in the same folder.
    """
    with ExitStack() as held:
        _evaluate(request, held)


def _evaluate(request: Request, held: ExitStack) -> None:
    let_segments_grow()
    if reason := start_gpu():
        print(f"warning: {reason}", file=sys.stderr, flush=True)
    # With more threads convolutions add in another order, so that the last bits of features would
    # depend on the number of processes. One process per core uses all cores.
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1
    device = distributed.init(TIMEOUT_MINUTES, threads)
    failure.watch()
    say = _say if distributed.is_main() else _say_nothing
    began = time.monotonic()
    chosen = _chosen(request)
    try:
        # Once: a run that goes on has another newest checkpoint when the evaluation ends.
        source = _located(request.model)
        trunk = open_model(source)
        name = name_of(trunk)
        folder = request.out or _default_folder(request, trunk, chosen)
        _own(folder, f"{'--out ' if request.out else ''}{folder}", held)
        context = Context(
            model=request.model,
            trunk=trunk.to(device).eval(),
            trunk_name=name,
            data=request.data,
            folder=folder,
            device=device,
            say=say,
            labels=request.labels,
            features=request.features,
        )
        say(f"{request.task}: {name} of {request.model} on {request.data}, in {folder}")
        result = run_task(request.task, context, request.options)
        failure.unwatch()
    except Exception as error:
        if isinstance(error, UserError) or refusal(error):  # the command prints one sentence
            failure.mark()
            raise
        failure.end(error)
    if distributed.is_main():
        report = {
            "task": request.task,
            "model": request.model,
            "trunk": name,
            "data": request.data,
            "labels": request.labels,
            "preset": request.preset,
            "options": chosen,
            "metrics": result.metrics,
            "details": result.details,
            "pictures": [str(path) for path in result.pictures],
            "versions": versions(),
            "world_size": distributed.world_size(),
            "seconds": round(time.monotonic() - began, 3),
        }
        own = folder / f"{request.task}.json"
        write_report(own, report)
        if request.json is not None:
            write_report(request.json, report)
        for metric, value in result.metrics.items():
            print(f"{metric:<24}{value:.4f}", flush=True)
        keep_in_run(report, source)
        log_report(
            report,
            [own, *result.pictures],
            model=source,
            name=folder.name,
            uri=request.mlflow_uri,
            say=say,
        )
        say(f"result: {request.json or own}")
    distributed.barrier()
    distributed.shutdown()


def _located(model: str) -> str:
    """Returns where the weights of a local source lie now; other sources as they are."""
    path = Path(model).expanduser()
    return str(locate(path)) if path.exists() else model


def run_task(name: str, context: Context, options: TaskOptions) -> Result:
    """Runs a task; only its own module is imported, and with it the packages that it needs."""
    result: Result = import_module(f"seer_scale.evaluation.tasks.{name}").run(context, options)
    return result


def open_model(source: str) -> nn.Module:
    """Opens a trunk in eval mode.

    Args:
        source: anything that `seer_scale.load` takes; or `random:TRUNK` or `random:TRUNK:SEED`, an
            untrained trunk.

    Raises:
        UserError: whatever is wrong with the source.
    """
    if not source.startswith(RANDOM):
        from seer_scale import load

        return load(source)
    name, _, seed = source.removeprefix(RANDOM).partition(":")
    if seed and not seed.isdecimal():
        raise ConfigError(
            f"--model {source}: the seed {seed!r} is not an integer >= 0: write {RANDOM}{name}:0"
        )
    trunk = build_trunk(name, device="cpu")
    initialise(trunk, int(seed or 0))
    return trunk.eval()


def _own(folder: Path, said: str, held: ExitStack) -> None:
    """Owns the folder until `held` is closed; rank 0 does, and every rank gets the refusal."""
    problem = None
    if distributed.is_main():
        try:
            held.enter_context(owned(folder, said))
        except UserError as error:
            problem = str(error)
    if problem := distributed.broadcast_object(problem):
        raise UserError(problem)


def _chosen(request: Request) -> dict[str, Any]:
    """Returns the options as reports and digests have them: --labels is also an option `labels`."""
    chosen = request.options.model_dump(mode="json")
    if "labels" in chosen:
        chosen["labels"] = chosen["labels"] or request.labels
    return chosen


def _default_folder(request: Request, trunk: nn.Module, chosen: dict[str, Any]) -> Path:
    """Returns the folder of every evaluation that has the same weights, data and options."""
    about = {
        "weights": weights_digest(trunk),
        "data": [os.path.abspath(part) for part in request.data.split(",")],
        "labels": request.labels and os.path.abspath(request.labels),
        "options": chosen,
    }
    digest = xxhash.xxh3_64_hexdigest(json.dumps(about, sort_keys=True).encode())
    return Path("runs/evaluations") / f"{request.task}-{digest[:12]}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    """Ignores a line, on every rank other than 0."""
