"""Judges a trunk: `seer-scale evaluate TASK --model SOURCE --data PATH [--preset NAME]`.

The command gives the same numbers under torchrun, deepspeed and plain python.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from seer_scale.config.argument_types import Parser
from seer_scale.config.home_folder import expand_home, local_path
from seer_scale.config.key_values import build_from_texts, describe_keys, split_key_values
from seer_scale.errors import ConfigError, suggestion
from seer_scale.evaluation.options import OPTIONS
from seer_scale.evaluation.presets import PRESETS, Preset

FEATURES = Path("runs/evaluations/features")
USAGE = """%(prog)s TASK --model SOURCE --data PATH [--labels FILE] [--preset NAME]
                          [--json FILE] [--out FOLDER] [--features FOLDER] [--mlflow-uri URI]
                          [key=value ...]"""
TASKS = {
    "knn": "weighted k-nearest-neighbour classification of features",
    "linear": "linear heads on frozen features of several maps",
    "lowshot": "training with 1 %, 10 % or k labels per class",
    "finetune": "training of the whole trunk and a classifier",
    "svm": "mean average precision of linear SVMs, VOC 2007's protocol",
    "transfer": "another labelled set, by a linear probe or fine-tuning",
    "detect": "Mask R-CNN with FPN on the trunk, COCO's format and metrics",
    "retrieval": "mean average precision of image retrieval, CopyDays' protocol",
}
TRANSFERS = ("linear", "finetune")  # tasks that `transfer` can run, with their presets


def main(argv: list[str]) -> int:
    """Runs the command and returns 0; a mistake of the user raises a `UserError`."""
    parsed, rest = parser().parse_known_args(argv)
    texts = split_key_values(rest)
    if parsed.task not in TASKS:
        raise _unknown("task", parsed.task, list(TASKS))
    preset = _preset(parsed.preset, parsed.task)
    if parsed.labels is not None and not Path(parsed.labels).is_file():
        raise ConfigError(f"--labels {parsed.labels} is not a file: give a CSV of `name,class`")
    options = build_from_texts(
        OPTIONS[parsed.task], _given(preset, parsed.task), texts, where=f"task {parsed.task}: "
    )
    # This imports torch, which takes seconds: every mistake above is reported at once.
    from seer_scale.evaluation.session import Request, evaluate

    evaluate(
        Request(
            task=parsed.task,
            options=options,
            model=parsed.model,
            data=parsed.data,
            labels=parsed.labels,
            preset=parsed.preset,
            json=parsed.json,
            out=parsed.out,
            features=parsed.features,
            mlflow_uri=parsed.mlflow_uri,
        )
    )
    return 0


def _preset(name: str | None, task: str) -> Preset | None:
    if name is None:
        return None
    if name not in PRESETS:
        raise _unknown("preset", name, list(PRESETS))
    preset = PRESETS[name]
    own = (*TRANSFERS, task) if task == "transfer" else (task,)
    if preset.task not in own:
        fitting = [other for other, its in PRESETS.items() if its.task in own]
        raise ConfigError(
            f"--preset {name} belongs to the task {preset.task}: the task {task} has "
            + (", ".join(fitting) or "no preset")
        )
    return preset


def _given(preset: Preset | None, task: str) -> dict[str, Any]:
    """Returns the options that a preset sets; `transfer` passes them on to the preset's task."""
    if preset is None:
        return {}
    if preset.task == task:
        return dict(preset.options)
    return {"method": preset.task, "options": dict(preset.options)}


def _unknown(kind: str, name: str, known: list[str]) -> ConfigError:
    hint = suggestion(name, known, f"the {kind}s are {', '.join(known)}")
    return ConfigError(f"{name} is not a {kind}: {hint}")


class _Parser(Parser):
    def format_help(self) -> str:
        return "\n".join([super().format_help(), *_preset_lines(), "", *_option_lines(), ""])


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    parser = _Parser(
        usage=USAGE,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("task", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "--model",
        type=expand_home,
        required=True,
        metavar="SOURCE",
        help="anything that seer_scale.load takes: a run, a checkpoint, an exported trunk, "
        "models:/NAME@alias ...; or random:TRUNK[:SEED], an untrained trunk",
    )
    parser.add_argument(
        "--data",
        type=expand_home,
        required=True,
        metavar="PATH",
        help="a folder with `train` and `val` below it, or TRAIN,VAL; each is a folder of classes "
        "or of shards",
    )
    parser.add_argument(
        "--labels",
        type=expand_home,
        metavar="FILE",
        help="CSV of `name,class` for every image, which replaces the labels of the data",
    )
    parser.add_argument("--preset", metavar="NAME", help="published hyperparameters, see below")
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="also write the result to FILE"
    )
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="FOLDER",
        help="folder of this evaluation, in which a killed one resumes "
        "(runs/evaluations/TASK-DIGEST)",
    )
    parser.add_argument(
        "--features",
        type=local_path,
        default=FEATURES,
        metavar="FOLDER",
        help=f"folder that keeps features for other tasks ({FEATURES})",
    )
    parser.add_argument(
        "--mlflow-uri",
        type=expand_home,
        metavar="URI",
        help="MLflow server; without it the model's own server, MLFLOW_TRACKING_URI or "
        "sqlite:///mlflow.db; `none` logs nothing",
    )
    # The deepspeed launcher appends this option; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _preset_lines() -> list[str]:
    return ["presets:", *(f"  {name:<24}{p.task}: {p.about}" for name, p in PRESETS.items())]


def _option_lines() -> list[str]:
    lines = ["tasks and their options (key=value):"]
    for task, about in TASKS.items():
        lines += ["", f"{task}: {about}", *describe_keys(OPTIONS[task])]
    return lines
