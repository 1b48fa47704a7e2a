"""A trunk as a logged model of a run and as a version of a registered model, each made once.

Whoever comes second, or again after a lost reply, finds what is there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException

from seer_scale.tracking.mlflow_client.descriptions import is_ours, of_model
from seer_scale.tracking.mlflow_client.packing import pack
from seer_scale.tracking.mlflow_client.requests import found_or_created, patient_uploads

DIGEST_TAG = "seer_scale.digest"  # of the weights
_TEXT_TAG = "mlflow.note.content"
_ORIGIN_TAGS = ("mlflow.user", "mlflow.source.")  # which a logged model shows too
_VERSIONS_TAG = "mlflow.modelVersions"  # of a logged model; its page lists them


def logged_model(
    client: MlflowClient,
    run_id: str,
    experiment: str,
    folder: Path,
    *,
    step: int,
    tags: Mapping[str, str],
    text: str,
    scratch: Path,
) -> str:
    """Uploads a trunk as a logged model of a run, unless it is there; returns the model's id.

    Args:
        client: client of the server.
        run_id: the run that made the trunk.
        experiment: id of the run's experiment.
        folder: the trunk: `trunk.safetensors` and `config.json`.
        step: training step of the trunk.
        tags: tags of the model, `step` and `DIGEST_TAG` among them.
        text: the model's description.
        scratch: folder with room for a copy of the weights; made if it is missing.
    """
    config = json.loads((folder / "config.json").read_text())
    same = f"source_run_id = '{run_id}' AND tags.`{DIGEST_TAG}` = '{tags[DIGEST_TAG]}'"

    def find() -> LoggedModel | None:
        models = client.search_logged_models([experiment], same)
        return next((one for one in models if one.tags.get("step") == tags["step"]), None)

    def create() -> LoggedModel:
        of_run = client.get_run(run_id).data.tags
        origin = {key: value for key, value in of_run.items() if key.startswith(_ORIGIN_TAGS)}
        return client.create_logged_model(
            experiment,
            name=f"{config['trunk']}-step-{step}",
            source_run_id=run_id,
            tags={**origin, **tags, _TEXT_TAG: text},
            params={"trunk": config["trunk"], "width": str(config["width"])},
            model_type="trunk",
        )

    model = found_or_created(find, create)
    model_id = str(model.model_id)
    if model.status == LoggedModelStatus.READY:
        return model_id
    # New, or what a sender left that died while it uploaded.
    _log_output(client, run_id, model_id, step)
    # In the run folder: a copy of the weights may be larger than the system's /tmp.
    scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as packed, patient_uploads():
        pack(Path(packed), folder, config, run_id, model_id)
        client.log_model_artifacts(model_id, packed)
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    return model_id


def version_of(
    client: MlflowClient, run_id: str, name: str, model_id: str, tags: Mapping[str, str], text: str
) -> str:
    """Registers a logged model as a version of `name`, unless it is one; returns its number."""
    source = f"models:/{model_id}"

    def find() -> str | None:
        versions = client.search_model_versions(f"run_id = '{run_id}'")
        same = (one for one in versions if one.name == name and one.source == source)
        return next((str(one.version) for one in same), None)

    def create() -> str:
        version = client.create_model_version(
            name, source, run_id, dict(tags), description=text, model_id=model_id
        )
        return str(version.version)

    if (number := find()) is None:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        number = found_or_created(find, create)
        if is_ours(client.get_registered_model(name).description):
            client.update_registered_model(name, of_model(number, text))
    _link(client, model_id, name, number)
    return number


def _log_output(client: MlflowClient, run_id: str, model_id: str, step: int) -> None:
    """Notes the model as an output of the run, which MLflow takes only once."""

    def find() -> bool | None:
        outputs = client.get_run(run_id).outputs
        known = outputs.model_outputs if outputs else []
        return True if any(one.model_id == model_id for one in known) else None

    def create() -> bool:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=step)])
        return True

    found_or_created(find, create)


def _link(client: MlflowClient, model_id: str, name: str, version: str) -> None:
    """Notes a version on the logged model, as `mlflow.register_model` does; once."""
    tags = client.get_logged_model(model_id).tags
    known = json.loads(tags.get(_VERSIONS_TAG, "[]"))
    if not any((v["name"], str(v["version"])) == (name, version) for v in known):
        known.append({"name": name, "version": int(version)})
        client.set_logged_model_tags(model_id, {_VERSIONS_TAG: json.dumps(known)})
