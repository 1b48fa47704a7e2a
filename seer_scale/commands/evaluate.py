"""Judges a trunk: `seer-scale evaluate TASK --model SOURCE --data PATH [--preset NAME]`.

Runs the same under torchrun, deepspeed and plain python, and gives the same numbers.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from seer_scale.config.argument_types import Parser
from seer_scale.errors import ConfigError, UserError
from seer_scale.evaluation.options import (
    build_options,
    describe_options,
    parse_overrides,
)
from seer_scale.evaluation.presets import PRESETS, Preset
from seer_scale.storage.disk_refusal import refusal

if TYPE_CHECKING:
    from torch import nn

    from seer_scale.evaluation.task import Context, Result, TaskOptions

RANDOM = "random:"
FEATURES = Path("runs/evaluations/features")
TIMEOUT_MINUTES = 600.0  # ranks wait for one that solves or draws
USAGE = """%(prog)s TASK --model SOURCE --data PATH [--labels FILE] [--preset NAME]
                          [--json FILE] [--out FOLDER] [--features FOLDER] [--mlflow-uri URI]
                          [key=value ...]"""
TASKS = {
    "knn": "weighted k-nearest-neighbour classification of features",
    "linear": "linear heads on frozen features of several maps",
    "lowshot": "1 %, 10 % or k labels per class",
    "finetune": "the whole trunk trained on, with a classifier",
    "svm": "mean average precision of linear SVMs, VOC 2007's protocol",
    "transfer": "another labelled set, by a linear probe or fine-tuning",
    "detect": "Mask R-CNN with FPN on the trunk, COCO's format and metrics",
    "retrieval": "mean average precision of image retrieval, CopyDays' protocol",
}


TRANSFERS = ("linear", "finetune")  # tasks that a transfer does, with their presets


class Task(NamedTuple):
    """What a task's module offers."""

    options: type[TaskOptions]
    run: Callable[[Context, Any], Result]


def load_task(name: str) -> Task:
    """Imports the module of one of `TASKS`, and with it what that task needs."""
    module = import_module(f"seer_scale.evaluation.tasks.{name}")
    return Task(module.Options, module.run)


def main(argv: list[str]) -> int:
    """The command line; 0, or a UserError."""
    parsed, rest = parser().parse_known_args(argv)
    overrides = parse_overrides(rest)
    if parsed.task not in TASKS:
        raise _unknown("task", parsed.task, list(TASKS))
    preset = _preset(parsed.preset, parsed.task)
    if parsed.labels is not None and not Path(parsed.labels).is_file():
        raise ConfigError(f"--labels {parsed.labels} is no file")

    # torch is first imported here: a mistyped name above is answered at once.
    task = load_task(parsed.task)
    given = _given(preset, parsed.task)
    if parsed.labels is not None and "labels" in task.options.model_fields:
        given.setdefault("labels", parsed.labels)
    options = build_options(parsed.task, task.options, given, overrides)
    evaluate(parsed, task, options)
    return 0


def evaluate(parsed: argparse.Namespace, task: Task, options: TaskOptions) -> None:
    """Loads the model, runs the task on every rank, and reports on rank 0."""
    import torch

    from seer_scale import distributed
    from seer_scale.distributed import failure
    from seer_scale.evaluation.maps import name_of
    from seer_scale.evaluation.report import log_report, write_report
    from seer_scale.evaluation.task import Context
    from seer_scale.serving import versions

    # With more threads convolutions add in another order, so that the last bits of features
    # would hang on the number of processes. One process per core uses them all.
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1
    device = distributed.init(TIMEOUT_MINUTES, threads)
    failure.watch()
    say = _say if distributed.is_main() else _say_nothing
    began = time.monotonic()
    try:
        trunk = open_model(parsed.model)
        name = name_of(trunk)
        folder = parsed.out or _default_folder(parsed, trunk, options)
        context = Context(
            model=parsed.model,
            trunk=trunk.to(device).eval(),
            trunk_name=name,
            data=parsed.data,
            folder=folder,
            device=device,
            say=say,
            labels=parsed.labels,
            features=parsed.features,
        )
        say(f"{parsed.task}: {name} of {parsed.model} on {parsed.data}, in {folder}")
        result = task.run(context, options)
        failure.unwatch()
    except Exception as error:
        if isinstance(error, UserError) or refusal(error):  # the command tells it in a sentence
            failure.mark()
            raise
        failure.end(error)
    if distributed.is_main():
        report = {
            "task": parsed.task,
            "model": parsed.model,
            "trunk": name,
            "data": parsed.data,
            "labels": parsed.labels,
            "preset": parsed.preset,
            "options": options.model_dump(mode="json"),
            "metrics": result.metrics,
            "details": result.details,
            "pictures": [str(path) for path in result.pictures],
            "versions": versions(),
            "world_size": distributed.world_size(),
            "seconds": round(time.monotonic() - began, 3),
        }
        own = folder / f"{parsed.task}.json"
        write_report(own, report)
        if parsed.json is not None:
            write_report(parsed.json, report)
        for metric, value in result.metrics.items():
            print(f"{metric:<24}{value:.4f}", flush=True)
        log_report(
            report,
            [own, *result.pictures],
            model=parsed.model,
            name=folder.name,
            uri=parsed.mlflow_uri,
            say=say,
        )
        say(f"result: {parsed.json or own}")
    distributed.barrier()
    distributed.shutdown()


def open_model(source: str) -> nn.Module:
    """What `seer_scale.load` takes, or `random:TRUNK` and `random:TRUNK:SEED`, untrained.

    Raises:
        UserError: whatever is wrong with the source.
    """
    if not source.startswith(RANDOM):
        from seer_scale import load

        return load(source)
    from seer_scale.models import build_trunk, initialise

    name, _, seed = source.removeprefix(RANDOM).partition(":")
    if seed and not seed.isdecimal():
        raise ConfigError(f"--model {source}: the seed {seed!r} is no number of 0 or more")
    trunk = build_trunk(name, device="cpu")
    initialise(trunk, int(seed or 0))
    return trunk.eval()


def _default_folder(parsed: argparse.Namespace, trunk: nn.Module, options: TaskOptions) -> Path:
    """One folder for whatever comes to the same result."""
    import xxhash

    from seer_scale.evaluation.feature_store import weights_digest

    about = {
        "weights": weights_digest(trunk),
        "data": [os.path.abspath(part) for part in parsed.data.split(",")],
        "labels": parsed.labels and os.path.abspath(parsed.labels),
        "options": options.model_dump(mode="json"),
    }
    digest = xxhash.xxh3_64_hexdigest(json.dumps(about, sort_keys=True).encode())
    return Path("runs/evaluations") / f"{parsed.task}-{digest[:12]}"


def _preset(name: str | None, task: str) -> Preset | None:
    if name is None:
        return None
    if name not in PRESETS:
        raise _unknown("preset", name, list(PRESETS))
    preset = PRESETS[name]
    if preset.task != task and not (task == "transfer" and preset.task in TRANSFERS):
        own = (*TRANSFERS, task) if task == "transfer" else (task,)
        fitting = [other for other, its in PRESETS.items() if its.task in own]
        raise ConfigError(
            f"--preset {name} is one of the task {preset.task}, not of {task}"
            + (f", which has {', '.join(fitting)}" if fitting else ", which has none")
        )
    return preset


def _given(preset: Preset | None, task: str) -> dict[str, Any]:
    """What a preset sets; a transfer is one of two other tasks on another set of images."""
    if preset is None:
        return {}
    if preset.task == task:
        return dict(preset.options)
    return {"method": preset.task, "options": dict(preset.options)}


def _unknown(kind: str, name: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? The {kind}s" if near else f"the {kind}s"
    return ConfigError(f"{name} is no {kind}; {hint} are {', '.join(known)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    """Ranks other than 0."""


class _Parser(Parser):
    def format_help(self) -> str:
        return "\n".join([super().format_help(), *_preset_lines(), "", *_option_lines(), ""])


def parser() -> argparse.ArgumentParser:
    """Of this command's line."""
    parser = _Parser(
        usage=USAGE,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("task", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "--model",
        required=True,
        metavar="SOURCE",
        help="what seer_scale.load takes: a run, a checkpoint, an exported trunk, "
        "models:/NAME@alias ...; or random:TRUNK[:SEED], untrained",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="a folder with `train` and `val` below it, or TRAIN,VAL; folders of classes or shards",
    )
    parser.add_argument("--labels", metavar="FILE", help="CSV of `name,class` for every image")
    parser.add_argument("--preset", metavar="NAME", help="published hyperparameters, see below")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="of this evaluation, which goes on there if it was killed; "
        "else runs/evaluations/TASK-DIGEST",
    )
    parser.add_argument(
        "--features",
        type=Path,
        default=FEATURES,
        metavar="FOLDER",
        help=f"keeps features for other tasks ({FEATURES})",
    )
    parser.add_argument(
        "--mlflow-uri",
        metavar="URI",
        help="the model's own server, else MLFLOW_TRACKING_URI or sqlite:///mlflow.db; `none` logs "
        "nothing",
    )
    # Appended by the deepspeed launcher; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _preset_lines() -> list[str]:
    return ["presets:", *(f"  {name:<24}{p.task}: {p.about}" for name, p in PRESETS.items())]


def _option_lines() -> list[str]:
    lines = ["tasks and their options (key=value):"]
    for task, about in TASKS.items():
        lines.append(f"  {task}: {about}")
        for option in describe_options(task):
            lines.append(f"    {option.name}: {option.type}; default: {option.default}")
            if option.description:
                lines.append(f"        {option.description}")
    return lines
