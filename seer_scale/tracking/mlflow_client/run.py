"""One run, its records and its models, each call repeatable.

A sender may die between a call and writing down that it was made, so everything here can be sent
twice with the effect of once: metrics carry their timestamps, runs and models are looked up before
they are created.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from seer_scale.tracking.mlflow_client.packing import pack

_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)
_SPOOL_TAG = "seer_scale.spool"
_DIGEST_TAG = "seer_scale.digest"
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
            pack(Path(packed), folder, config, str(self.run_id), str(model.model_id))
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
