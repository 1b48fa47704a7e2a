"""Checkpoints that a run has logged, for `--resume mlflow:RUN_ID`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from seer_scale.errors import UserError
from seer_scale.tracking.uri import one_line, redact


def find_checkpoints(run_id: str, uri: str, download_to: Path) -> list[Path]:
    """The checkpoints that a run has logged, newest first.

    Checkpoints logged by reference are where they were written. Of the checkpoints logged as
    copies, the newest that no longer exists locally is downloaded.

    Args:
        run_id: id of the MLflow run.
        uri: address of the server.
        download_to: the folder that a download is put into, under the checkpoint's own name.

    Raises:
        UserError: if the server does not answer, knows no such run, or the run has none.
    """
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found: dict[str, Path] = {}
    try:
        client.get_run(run_id)
        with tempfile.TemporaryDirectory() as scratch:
            for entry in client.list_artifacts(run_id, "checkpoints"):
                name = Path(entry.path).name
                if entry.path.endswith(".json"):
                    file = client.download_artifacts(run_id, entry.path, scratch)
                    path = Path(json.loads(Path(file).read_text())["path"])
                    if path.is_dir():
                        found[path.name] = path
                elif entry.is_dir:
                    found.setdefault(name, download_to / name)
        names = sorted(found, reverse=True)
        if names and not found[names[0]].exists():
            _download_whole(client, run_id, f"checkpoints/{names[0]}", found[names[0]])
    except MlflowException as error:
        raise UserError(
            f"--resume mlflow:{run_id}: not to be had from {redact(uri)}: {one_line(error)}"
        ) from None
    if not names:
        raise UserError(
            f"--resume mlflow:{run_id}: the run has logged no checkpoint that is still there; "
            "tracking.checkpoints=copy keeps them on the server"
        )
    return [found[name] for name in names if found[name].exists()]


def _download_whole(client: MlflowClient, run_id: str, artifact: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download") as scratch:
        Path(client.download_artifacts(run_id, artifact, scratch)).rename(target)
