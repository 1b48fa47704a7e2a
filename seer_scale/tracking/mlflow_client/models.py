"""Models of the MLflow registry: finds, downloads and registers them, and finds their run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from seer_scale.errors import UserError
from seer_scale.tracking.context import context
from seer_scale.tracking.mlflow_client.run import MlflowRun
from seer_scale.tracking.uri import one_line, redact


def download_model(source: str, uri: str) -> Path:
    """Downloads the exported trunk of `models:/NAME@alias`, `/version` or `models:/<id>`.

    Raises:
        UserError: if the server does not answer, or knows no such model.
    """
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        name, number = _version_of(client, source)
        if number is None:
            location = client.get_logged_model(name).artifact_location
        else:
            location = client.get_model_version_download_uri(name, number)
        folder = mlflow.artifacts.download_artifacts(location, tracking_uri=uri)
        flavor = Model.load(folder).flavors.get("python_function", {})
    except MlflowException as error:
        raise UserError(
            f"{source} is not to be had from {redact(uri)}: {one_line(error)}"
        ) from None
    if flavor.get("loader_module") != "seer_scale.serving":
        raise UserError(f"{source} is not a trunk that seer_scale logged")
    return Path(folder) / str(flavor["data"])


def _version_of(client: MlflowClient, source: str) -> tuple[str, str | None]:
    """Name and version of `models:/NAME@alias` or `/version`; of `models:/<id>` the id and None.

    MLflow's own resolution of models:/ always asks the process-wide registry.
    """
    name, at, alias = source.removeprefix("models:/").partition("@")
    name, slash, version = (name, "", "") if at else name.partition("/")
    if not at and not slash:
        return name, None
    if at or version == "latest":
        version = client.get_model_version_by_alias(name, alias or version).version
    return name, str(version)


def run_of_model(source: str, uri: str) -> tuple[str | None, int | None]:
    """Run and step of `models:/NAME@alias`, `/version` or `models:/<id>`; None where unknown.

    Raises:
        MlflowException: the server does not answer, or knows no such model.
    """
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    name, number = _version_of(client, source)
    if number is None:
        model = client.get_logged_model(name)
        run_id, tags = model.source_run_id, model.tags
    else:
        version = client.get_model_version(name, number)
        run_id, tags = version.run_id, version.tags
    step = tags.get("step", "")
    return run_id or None, int(step) if step.isdecimal() else None


def register_trunk(
    uri: str,
    folder: Path,
    *,
    name: str,
    aliases: Sequence[str],
    run_id: str | None,
    step: int,
    experiment: str,
    scratch: Path,
) -> str:
    """Registers an exported trunk under its run, whose status stays, or under a new run.

    Args:
        uri: address of the server, with credentials.
        folder: from `serving.export_trunk`.
        name: name of the registered model; also of a run of its own.
        aliases: aliases that shall point at the version.
        run_id: id of the run that the trunk comes from, if there is one.
        step: step of the trunk in that run.
        experiment: name of the experiment of a run of its own.
        scratch: a folder with room for a copy of the weights.

    Returns:
        The version.

    Raises:
        UserError: the server refuses, or does not answer.
    """
    run = MlflowRun(
        uri,
        experiment=experiment,
        registered_name=name,
        spool_id=f"registered {name}",
        run_id=run_id,
        scratch=scratch,
    )
    now = time.time_ns() // 1_000_000
    try:
        if run_id is None:
            run.open(name, now)
            run.set_tags(context())
        version = run.log_model(folder, step=step, tags={}, aliases=aliases)
        if run_id is None:
            run.finish("FINISHED", now)
    except MlflowException as error:
        raise UserError(
            f"{name} cannot be registered at {redact(uri)}: {one_line(error)}"
        ) from None
    return version


class RegisteredVersion(NamedTuple):
    """A version of a registered model and the aliases that point at it."""

    number: str
    aliases: list[str]


def newest_version(name: str, uri: str) -> RegisteredVersion:
    """Finds the version behind `models:/NAME@latest`.

    Raises:
        UserError: if the server does not answer, or has no such model.
    """
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        version = client.get_model_version_by_alias(name, "latest").version
        aliases = client.get_model_version(name, version).aliases
    except MlflowException as error:
        raise UserError(f"{name} is not registered at {redact(uri)}: {one_line(error)}") from None
    return RegisteredVersion(str(version), ["latest", *aliases])


def current_uri() -> str | None:
    """URI that the calling program gave to `mlflow.set_tracking_uri`, or None."""
    return str(mlflow.get_tracking_uri()) if mlflow.tracking.is_tracking_uri_set() else None
