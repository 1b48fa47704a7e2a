"""The only file that imports mlflow: one run, its records and its models, each call repeatable.

A sender may die between a call and writing down that it was made, so everything here can be sent
twice with the effect of once: metrics carry their timestamps, runs and models are looked up before
they are created. Importing this module takes seconds; call `quiet.quieten` first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.types import Schema, TensorSpec

import seer_scale
from seer_scale.errors import UserError
from seer_scale.tracking.uri import one_line, redact

_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)
_SPOOL_TAG = "seer_scale.spool"
_DIGEST_TAG = "seer_scale.digest"
_STUDY_TAG = "seer_scale.study"
_PARENT_TAG = "mlflow.parentRunId"  # what MLflow's pages nest by
_NOT_ON_INDEX = ("python", "seer_scale")
_MAX_METRICS, _MAX_PARAMS = 1000, 100  # per request of MLflow's API
_UPLOAD_TIMEOUT_S = 300


class MlflowRun:
    """One MLflow run that is created once and then continued, whoever sends."""

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        registered_name: str,
        spool_id: str,
        run_id: str | None,
        scratch: Path,
    ) -> None:
        self.run_id = run_id
        self._uri = uri
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._experiment = experiment
        self._experiment_id: str | None = None
        self._registered_name = registered_name
        self._spool_id = spool_id
        self._scratch = scratch

    def open(self, run_name: str, time: int) -> str:
        """Creates the run, or finds the one that this spool began, and marks it as running."""
        if self.run_id is None:
            tag = f"tags.`{_SPOOL_TAG}` = '{self._spool_id}'"
            found = self._client.search_runs([self._experiment_of_run()], tag)
            self.run_id = found[0].info.run_id if found else self._create(run_name, time)
        self._client.update_run(self.run_id, status="RUNNING")
        return str(self.run_id)

    def answers(self) -> bool:
        """Whether the server knows this run and lets it be written to."""
        if self.run_id is None:
            return False
        try:
            stage = self._client.get_run(self.run_id).info.lifecycle_stage
        except Exception:  # whatever it is, the answer is no
            return False
        return bool(stage == "active")

    def log_params(self, params: Mapping[str, str]) -> None:
        """Logs what is new. MLflow's parameters never change: other values become tags."""
        known = self._client.get_run(self.run_id).data.params
        params = {_name(key): value[:6000] for key, value in params.items()}
        new = [Param(key, value) for key, value in params.items() if key not in known]
        for batch in _batches(new, _MAX_PARAMS):
            self._client.log_batch(self.run_id, params=batch)
        changed = [key for key, value in params.items() if known.get(key, value) != value]
        self.set_tags({f"resumed.{key}": params[key] for key in changed})

    def log_metrics(self, points: Iterable[tuple[str, float, int, int]]) -> None:
        """Logs (name, value, timestamp in ms, step); MLflow drops those it has already."""
        metrics = [Metric(_name(key), value, time, step) for key, value, time, step in points]
        for batch in _batches(metrics, _MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=batch)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        values = [RunTag(_name(key), value) for key, value in tags.items()]
        for batch in _batches(values, _MAX_PARAMS):
            self._client.log_batch(self.run_id, tags=batch)

    def log_artifact(self, path: Path, folder: str) -> None:
        """Uploads a file or a folder."""
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone")
        upload = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        with _patient_uploads():
            upload(self.run_id, str(path), folder or None)

    def log_reference(self, path: str, step: int) -> None:
        """Says where a checkpoint stands, as a small artifact."""
        place = {"step": step, "path": path, "node": os.uname().nodename}
        self._client.log_dict(self.run_id, place, f"checkpoints/step_{step:08d}.json")

    def log_model(
        self, folder: Path, *, step: int, tags: Mapping[str, str], aliases: Sequence[str]
    ) -> str:
        """Logs an exported trunk, registers it as a version, tags it and points aliases at it.

        The same weights at the same step of a run are one version, however often they are sent.
        """
        with (folder / "trunk.safetensors").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        config = json.loads((folder / "config.json").read_text())
        tags = {
            "step": str(step),
            "trunk": str(config["trunk"]),
            **{_name(key): value for key, value in tags.items()},
            _DIGEST_TAG: digest,
        }
        model_id = self._logged_model(folder, config, step, tags)
        version = self._version(model_id, tags)
        for alias in aliases:
            # MLflow reserves `latest` and resolves it to the newest version by itself.
            if alias.lower() != "latest":
                self._client.set_registered_model_alias(self._registered_name, alias, version)
        return version

    def finish(self, status: str, time: int) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status, time)

    def system_metrics(self) -> Any:
        """A started monitor of this machine that writes to the run until its `finish()`."""
        monitor = SystemMetricsMonitor(
            self.run_id, resume_logging=True, node_id=os.uname().nodename, tracking_uri=self._uri
        )
        monitor.start()
        return monitor

    def _create(self, run_name: str, time: int) -> str:
        tags = {_SPOOL_TAG: self._spool_id}
        run = self._client.create_run(self._experiment_of_run(), time, tags, run_name)
        return str(run.info.run_id)

    def _experiment_of_run(self) -> str:
        if self._experiment_id is None and self.run_id is not None:
            self._experiment_id = self._client.get_run(self.run_id).info.experiment_id
        if self._experiment_id is None:
            try:
                self._experiment_id = self._client.create_experiment(
                    self._experiment, artifact_location=_local_artifacts(self._uri)
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(self._experiment)
                self._experiment_id = found.experiment_id
        return str(self._experiment_id)

    def _logged_model(
        self, folder: Path, config: Mapping[str, Any], step: int, tags: Mapping[str, str]
    ) -> str:
        experiment = self._experiment_of_run()
        same = f"source_run_id = '{self.run_id}' AND tags.`{_DIGEST_TAG}` = '{tags[_DIGEST_TAG]}'"
        for model in self._client.search_logged_models([experiment], same):
            if model.tags.get("step") != tags["step"]:
                continue
            if model.status == LoggedModelStatus.READY:
                return str(model.model_id)
            # What a sender left that died while it uploaded.
            self._client.delete_logged_model(model.model_id)
        model = self._client.create_logged_model(
            experiment,
            name=f"{config['trunk']}-step-{step}",
            source_run_id=self.run_id,
            tags=dict(tags),
            params={"trunk": config["trunk"], "width": str(config["width"])},
            model_type="trunk",
        )
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=step)])
        # In the run folder: a copy of the weights may be larger than the system's /tmp.
        self._scratch.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as packed, _patient_uploads():
            _pack(Path(packed), folder, config, str(self.run_id), str(model.model_id))
            self._client.log_model_artifacts(model.model_id, packed)
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return str(model.model_id)

    def _version(self, model_id: str, tags: Mapping[str, str]) -> str:
        name = self._registered_name
        for version in self._client.search_model_versions(f"run_id = '{self.run_id}'"):
            if version.name == name and version.source == f"models:/{model_id}":
                return str(version.version)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self._client.create_model_version(
            name, f"models:/{model_id}", self.run_id, tags=dict(tags), model_id=model_id
        )
        return str(version.version)


def download_model(source: str, uri: str) -> Path:
    """The folder with the exported trunk of `models:/NAME@alias`, `/version` or `models:/<id>`.

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
        raise UserError(f"{source} is no trunk that seer_scale logged")
    return Path(folder) / str(flavor["data"])


def _version_of(client: MlflowClient, source: str) -> tuple[str, str | None]:
    """Name and version of `models:/NAME@alias` or `/version`; of `models:/<id>` the id and None.

    MLflow's own resolution of models:/ asks the process-wide registry, whatever it is given.
    """
    name, at, alias = source.removeprefix("models:/").partition("@")
    name, slash, version = (name, "", "") if at else name.partition("/")
    if not at and not slash:
        return name, None
    if at or version == "latest":
        version = client.get_model_version_by_alias(name, alias or version).version
    return name, str(version)


def find_checkpoints(run_id: str, uri: str, download_to: Path) -> list[Path]:
    """The checkpoints that a run has logged, newest first.

    Those logged by reference are where they were written. Of those logged as copies, the newest
    that is not there any more is downloaded.

    Args:
        run_id: of the MLflow run.
        uri: of the server.
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


def log_study(
    uri: str,
    *,
    experiment: str,
    name: str,
    identity: str,
    children: Sequence[str],
    files: Sequence[Path],
    finished: bool,
) -> str:
    """Keeps the parent run of a study: its children nested below it, its report beside it.

    Args:
        uri: of the server.
        experiment: that parent and children are in.
        name: of the parent run.
        identity: of the study; the same one keeps its parent run.
        children: ids of the runs of its points.
        files: to be kept as artifacts.
        finished: whether no point is left.

    Returns:
        The parent's run id.

    Raises:
        UserError: if the server does not answer, or refuses.
    """
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        known = client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else client.create_experiment(experiment)
        found = client.search_runs([number], f"tags.`{_STUDY_TAG}` = '{identity}'")
        run = found[0] if found else client.create_run(number, run_name=name)
        run_id = str(run.info.run_id)
        client.set_tag(run_id, _STUDY_TAG, identity)
        for child in children:
            client.set_tag(child, _PARENT_TAG, run_id)
        for file in files:
            client.log_artifact(run_id, str(file), "report")
        client.update_run(run_id, status="FINISHED" if finished else "RUNNING")
    except MlflowException as error:
        raise UserError(f"the study is not kept at {redact(uri)}: {one_line(error)}") from None
    return run_id


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


def log_evaluation(
    uri: str,
    *,
    run_id: str | None,
    experiment: str,
    run_name: str,
    params: Mapping[str, str],
    metrics: Mapping[str, float],
    step: int,
    files: Iterable[Path],
    folder: str,
    scratch: Path,
) -> str:
    """Logs metrics and files under a run, whose status stays as it is, or under one of its own.

    Args:
        uri: of the server, with credentials.
        run_id: of the run, if there is one.
        experiment: of a run of its own.
        run_name: of a run of its own, which the same name finds again.
        params: of a run of its own.
        metrics: values by name.
        step: of the model.
        files: to be uploaded.
        folder: of the run's artifacts that they go to.
        scratch: unused while no model is logged.

    Returns:
        The run's id.

    Raises:
        MlflowException: the server refuses, or does not answer.
    """
    run = MlflowRun(
        uri,
        experiment=experiment,
        registered_name="",
        spool_id=run_name,
        run_id=run_id,
        scratch=scratch,
    )
    now = time.time_ns() // 1_000_000
    own = run_id is None
    if own:
        run.open(run_name, now)
        run.log_params(params)
    run.log_metrics((name, value, now, step) for name, value in metrics.items())
    for file in files:
        run.log_artifact(file, folder)
    if own:
        run.finish("FINISHED", now)
    return str(run.run_id)


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
    """Registers an exported trunk under its run, whose status stays, or under one of its own.

    Args:
        uri: of the server, with credentials.
        folder: from `serving.export_trunk`.
        name: of the registered model; also of a run of its own.
        aliases: that shall point at the version.
        run_id: of the run that the trunk comes from, if there is one.
        step: of the trunk in that run.
        experiment: of a run of its own.
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
    """The version that `models:/NAME@latest` stands for.

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
    """What the calling program gave to `mlflow.set_tracking_uri`, if it did."""
    return str(mlflow.get_tracking_uri()) if mlflow.tracking.is_tracking_uri_set() else None


def _pack(path: Path, folder: Path, config: Mapping[str, Any], run_id: str, model_id: str) -> None:
    """Writes an MLflow model folder: the exported trunk as data, this package as its code."""
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 3, -1, -1))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, config["width"]))]),
    )
    versions = config["versions"].items()
    needed = [f"{name}=={number}" for name, number in versions if name not in _NOT_ON_INDEX]
    mlflow.pyfunc.save_model(
        path=str(path),
        loader_module="seer_scale.serving",
        data_path=str(folder),
        # Makes the model loadable where seer_scale is not installed.
        code_paths=[str(Path(seer_scale.__file__).parent)],
        signature=signature,
        pip_requirements=[f"mlflow=={mlflow.__version__}", *needed],
        metadata={key: config[key] for key in ("trunk", "width", "mean", "std", "versions")},
        mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
    )
    for cache in list(path.rglob("__pycache__")):
        shutil.rmtree(cache)


@contextmanager
def _patient_uploads() -> Iterator[None]:
    """A server may answer a large upload only when it has passed it on to its own storage."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(max(_UPLOAD_TIMEOUT_S, int(before)))
    try:
        yield
    finally:
        os.environ[name] = before


def _local_artifacts(uri: str) -> str | None:
    """An embedded database keeps artifacts beside it, not in whatever folder a sender runs in."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def _name(key: str) -> str:
    return _NOT_IN_NAMES.sub("_", key)[:250]


def _batches(values: Iterable[Any], size: int) -> Iterable[list[Any]]:
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch
