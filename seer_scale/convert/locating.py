"""Locates the weights of a source on this machine, and downloads them if needed."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from seer_scale.convert.files import FOLDER_FILES
from seer_scale.errors import CheckpointError, UserError
from seer_scale.serving import WEIGHTS
from seer_scale.tracking.quiet import quieten
from seer_scale.tracking.uri import answers, redact, resolve_uri

REGISTRY = "models:/"
HUB = "hf:"
_MANIFEST = "manifest.json"  # of a checkpoint that can be resumed from


def locate(source: str | os.PathLike[str], tracking_uri: str | None = None) -> Path:
    """Finds the folder or file of a source's weights.

    Args:
        source: see `seer_scale.load`.
        tracking_uri: address of the registry; `mlflow.set_tracking_uri`'s, else
            MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db`.

    Raises:
        UserError: if there is no such file, folder or model, or a server does not answer.
        CheckpointError: if a folder holds no weights.
    """
    source = os.path.expanduser(source)
    text = str(source)
    if text.startswith(REGISTRY):
        return _from_registry(text, tracking_uri)
    if text.startswith(HUB):
        return _from_hub(text.removeprefix(HUB))
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(
            f"{path} is neither a folder nor a file; give a run, a checkpoint, an exported trunk, "
            f"a file of weights, {REGISTRY}NAME@latest or {HUB}ORG/NAME"
        )
    return _weights_in(path)


def _weights_in(folder: Path) -> Path:
    newest_first = sorted((folder / "checkpoints").glob("step_*[0-9]"), reverse=True)
    steps = (step for step in (folder, *newest_first) if (step / _MANIFEST).is_file())
    newest = next(steps, None)
    for candidate in (folder, folder / "trunk", *(step / "trunk" for step in newest_first)):
        if (candidate / WEIGHTS).is_file():
            if newest is not None and candidate.parent < newest:
                warnings.warn(f"{candidate} is taken, because {_missing(newest)}", stacklevel=3)
            return candidate
    if any((folder / name).is_file() for name in FOLDER_FILES):
        return folder
    if newest is not None:
        raise CheckpointError(_missing(newest))
    raise CheckpointError(
        f"{folder} holds no trunk: neither {WEIGHTS}, trunk/{WEIGHTS}, "
        f"checkpoints/step_*/trunk/{WEIGHTS} nor {', '.join(FOLDER_FILES[1:])} is there"
    )


def _missing(step: Path) -> str:
    return (
        f"{step} has no trunk/, because its run had to end first: join its tensors with "
        f"`seer-scale checkpoint consolidate {step}`, and give {step}_consolidated"
    )


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{HUB}{name} needs huggingface_hub; pip install huggingface_hub") from None
    if len(name.split("/")) != 2:
        raise UserError(f"{HUB}{name} is not a model of the hub; write {HUB}ORG/NAME")
    patterns = ["*.json", "*.safetensors", "pytorch_model*.bin"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    # The library lets its HTTP client's own exceptions through; none of them is a bug of ours.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{HUB}{name} cannot be fetched ({reason[:120]}); check the name and the network, or "
            "give a folder"
        ) from None
    return _weights_in(folder)


def _from_registry(source: str, tracking_uri: str | None) -> Path:
    quieten()
    from seer_scale.tracking.mlflow_client import current_uri, download_model

    uri = resolve_uri(tracking_uri or current_uri())
    database = uri.startswith("sqlite:///")  # MLflow would make one that is not there
    if not (Path(uri.removeprefix("sqlite:///")).is_file() if database else answers(uri)):
        raise UserError(
            f"the MLflow server or database {redact(uri)} does not answer; "
            "set MLFLOW_TRACKING_URI to the one that holds the model"
        )
    return download_model(source, uri)
