"""One call from anything that holds a trunk to a torch module: a folder, a run, a registry."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from torch import nn

from seer_scale.errors import CheckpointError, UserError
from seer_scale.serving import WEIGHTS, load_trunk
from seer_scale.tracking.quiet import quieten
from seer_scale.tracking.uri import redact, resolve_uri

REGISTRY = "models:/"


def load(source: str | os.PathLike[str], *, tracking_uri: str | None = None) -> nn.Module:
    """Loads a trunk in eval mode on the CPU: images [B, 3, H, W] -> features [B, C].

    Args:
        source: an exported trunk's folder, a checkpoint folder, a run folder (its newest
            checkpoint), or `models:/NAME@alias`, `models:/NAME/version`, `models:/<model_id>`.
        tracking_uri: of the registry; `mlflow.set_tracking_uri`'s, else MLFLOW_TRACKING_URI, else
            `sqlite:///mlflow.db`.

    Raises:
        UserError: if there is no such folder or model, or the registry does not answer.
        CheckpointError: if the trunk's files are missing or damaged.
    """
    if str(source).startswith(REGISTRY):
        return load_trunk(_from_registry(str(source), tracking_uri))
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder; give a run, a checkpoint, an exported trunk or "
            f"{REGISTRY}NAME@latest"
        )
    return load_trunk(_exported_trunk(folder))


def _exported_trunk(folder: Path) -> Path:
    newest_first = sorted((folder / "checkpoints").glob("step_*[0-9]"), reverse=True)
    for candidate in (folder, folder / "trunk", *(step / "trunk" for step in newest_first)):
        if (candidate / WEIGHTS).is_file():
            return candidate
    raise CheckpointError(
        f"{folder} holds no trunk: neither {WEIGHTS}, trunk/{WEIGHTS} nor "
        f"checkpoints/step_*/trunk/{WEIGHTS} is there"
    )


def _from_registry(source: str, tracking_uri: str | None) -> Path:
    quieten()
    from seer_scale.tracking.mlflow_client import current_uri, download_model

    uri = resolve_uri(tracking_uri or current_uri())
    if not _answers(uri):
        raise UserError(
            f"the MLflow server or database {redact(uri)} does not answer; "
            "set MLFLOW_TRACKING_URI to the one that holds the model"
        )
    return download_model(source, uri)


def _answers(uri: str) -> bool:
    """Whether a server answers at all, or a database file is there; spares minutes of retries."""
    if uri.startswith("sqlite:///"):
        return Path(uri.removeprefix("sqlite:///")).is_file()
    if not uri.startswith("http"):
        return True
    try:
        urlopen(f"{redact(uri).rstrip('/')}/health", timeout=10).close()
    except HTTPError:
        return True
    except OSError:
        return False
    return True
