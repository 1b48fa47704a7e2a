"""Last words of a finished run: where its trunk is, and the commands that come next."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from seer_scale.checkpoint import checkpoint_folder
from seer_scale.config import RunConfig
from seer_scale.models.regnet import trunk_config
from seer_scale.serving import USUAL_SIZE, WEIGHTS
from seer_scale.tracking.spool import FOLDER, end_of, version_of
from seer_scale.tracking.uri import redact, resolve_uri

_TIMM_STAGES = 4  # of timm's RegNets
_PORT = 5001  # MLflow's own pages are at 5000


def afterword(config: RunConfig) -> str | None:
    """The last lines of a run whose last step is done; None if this folder has no such step.

    Args:
        config: configuration of the run.
    """
    run_dir, steps, tracking = Path(config.run.dir), config.train.steps, config.tracking
    folder = checkpoint_folder(run_dir / "checkpoints", steps)
    if not folder.is_dir():
        return None
    lines = [f"finished: step {steps} of {steps} is done and saved in {folder}"]
    if not (folder / "trunk" / WEIGHTS).is_file():
        return f"{lines[0]}, without a trunk: `seer-scale checkpoint list {run_dir}` shows others"
    version = version_of(run_dir, steps) if tracking.enabled and tracking.log_models else None
    if version:
        known_as = f"version {version} of {tracking.registered_name} in MLflow"
    elif tracking.enabled and tracking.log_models:
        known_as = f"not registered yet (`seer-scale sync {run_dir}` sends the rest)"
    else:
        known_as = "not sent to MLflow"
    lines.append(f"trunk: {folder / 'trunk'}, {known_as}")
    return "\n".join([*lines, "next:", *(f"  {line}" for line in _commands(config, version))])


def has_ended(config: RunConfig) -> bool:
    """Whether nothing is left to do in run.dir: its tracker knows of the end, or there is none."""
    folder = Path(config.run.dir) / FOLDER
    return not (config.tracking.enabled and folder.is_dir()) or end_of(folder) == "FINISHED"


def _commands(config: RunConfig, version: str | None) -> list[str]:
    """The commands that evaluate and convert the trunk and, if it is registered, serve it."""
    run, size = shlex.quote(config.run.dir), max(config.data.crop_sizes)
    labelled = shlex.quote(config.eval.data) if config.eval.data else "LABELLED"
    own_size = "" if size == USUAL_SIZE else f" size={size}"
    # timm builds RegNets of four stages only.
    stages = len(trunk_config(config.model.trunk).stages)
    to = "timm" if stages == _TIMM_STAGES else "huggingface"
    out = shlex.quote(f"exports/{Path(config.run.dir).name}-{to}")
    commands = [
        f"seer-scale evaluate knn --model {run} --data {labelled}{own_size}",
        f"seer-scale convert {run} --to {to} --out {out}",
    ]
    if version:
        uri = redact(resolve_uri(config.tracking.uri))
        if uri.startswith("sqlite:"):  # a server has its pages already
            commands.append(
                f"mlflow server --host 127.0.0.1 --backend-store-uri {shlex.quote(uri)}"
                "   # shows the run at http://127.0.0.1:5000"
            )
        known = os.environ.get("MLFLOW_TRACKING_URI") == uri
        model = shlex.quote(f"models:/{config.tracking.registered_name}/{version}")
        commands.append(
            ("" if known else f"MLFLOW_TRACKING_URI={shlex.quote(uri)} ")
            + f"mlflow models serve --env-manager local --port {_PORT} --model-uri {model}"
        )
    return commands
