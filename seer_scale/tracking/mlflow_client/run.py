"""One MLflow run with its records and models; every call can be repeated.

A sender may die between a call and the note that the call was made, and a reply may be lost after
the server has done what was asked. So sending twice has the effect of sending once: metrics carry
their timestamps, and runs, models and versions are looked up before they are created.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from seer_scale.errors import UserError
from seer_scale.tracking.mlflow_client.database import make_database
from seer_scale.tracking.mlflow_client.datasets import dataset_input
from seer_scale.tracking.mlflow_client.descriptions import is_ours, of_model, of_version, with_knn
from seer_scale.tracking.mlflow_client.experiments import deletion
from seer_scale.tracking.mlflow_client.registration import DIGEST_TAG, logged_model, version_of
from seer_scale.tracking.mlflow_client.requests import found_or_created, patient_uploads

_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)
_SPOOL_TAG = "seer_scale.spool"
_MAX_METRICS, _MAX_PARAMS = 1000, 100  # per request of MLflow's API


class MlflowRun:
    """One MLflow run, created once and then continued by any sender."""

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
        make_database(uri)
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._experiment = experiment
        self._experiment_id: str | None = None
        self._registered_name = registered_name
        self._spool_id = spool_id
        self._scratch = scratch

    def open(self, run_name: str, time: int) -> str:
        """Creates the run, or finds the one that this spool began, and marks it as running."""
        if self.run_id is None:
            self.run_id = found_or_created(self._find, lambda: self._create(run_name, time))
        self._client.update_run(self.run_id, status="RUNNING")
        return str(self.run_id)

    def answers(self) -> bool:
        """Tells whether the server knows this run and accepts writes to the run."""
        if self.run_id is None:
            return False
        try:
            stage = self._client.get_run(self.run_id).info.lifecycle_stage
        except Exception:  # whatever it is, the answer is no
            return False
        return bool(stage == "active")

    def deletion(self) -> str | None:
        """One sentence if the run's experiment is deleted on the server; None if not, or unknown.

        MLflow deletes the runs of an experiment with it, and restores them with it.
        """
        try:
            number = self._client.get_run(self.run_id).info.experiment_id
            found = self._client.get_experiment(number)
        except Exception:  # whatever it is, it is not this
            return None
        deleted = found.lifecycle_stage == "deleted"
        return deletion(found.name, number) if deleted else None

    def log_params(self, params: Mapping[str, str]) -> None:
        """Logs new parameters. Parameters never change in MLflow: changed values become tags."""
        known = self._client.get_run(self.run_id).data.params
        params = {_name(key): value[:6000] for key, value in params.items()}
        new = [Param(key, value) for key, value in params.items() if key not in known]
        for batch in _batches(new, _MAX_PARAMS):
            self._client.log_batch(self.run_id, params=batch)
        changed = [key for key, value in params.items() if known.get(key, value) != value]
        self.set_tags({f"resumed.{key}": params[key] for key in changed})

    def log_metrics(self, points: Iterable[tuple[str, float, int, int]]) -> None:
        """Logs (name, value, timestamp in ms, step); MLflow drops duplicates."""
        metrics = [Metric(_name(key), value, time, step) for key, value, time, step in points]
        for batch in _batches(metrics, _MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=batch)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        values = [RunTag(_name(key), value) for key, value in tags.items()]
        for batch in _batches(values, _MAX_PARAMS):
            self._client.log_batch(self.run_id, tags=batch)

    def log_dataset(self, path: str, digest: str, images: int, used_for: str) -> None:
        """Logs a collection of images as an input of the run; see `datasets.dataset_input`."""
        chosen = dataset_input(path, digest, images, used_for)
        self._client.log_inputs(self.run_id, datasets=[chosen])

    def log_artifact(self, path: Path, folder: str) -> None:
        """Uploads a file or a folder."""
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone")
        upload = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        with patient_uploads():
            upload(self.run_id, str(path), folder or None)

    def log_reference(self, path: str, step: int) -> None:
        """Logs the path of a checkpoint, as a small artifact."""
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
            DIGEST_TAG: digest,
        }
        text = of_version(config, tags)
        model_id = logged_model(
            self._client,
            str(self.run_id),
            self._experiment_of_run(),
            folder,
            step=step,
            tags=tags,
            text=text,
            scratch=self._scratch,
        )
        version = version_of(
            self._client, str(self.run_id), self._registered_name, model_id, tags, text
        )
        for alias in aliases:
            # MLflow reserves `latest` and resolves it to the newest version by itself.
            if alias.lower() != "latest":
                self._client.set_registered_model_alias(self._registered_name, alias, version)
        return version

    def describe_knn(self, step: int, top1: float) -> None:
        """Writes a k-NN accuracy into the texts of the versions of `step`, unless a person did."""
        for version in self._client.search_model_versions(f"run_id = '{self.run_id}'"):
            name, number = version.name, str(version.version)
            if version.tags.get("step") != str(step) or not is_ours(version.description):
                continue
            text = with_knn(version.description or "", top1)
            self._client.update_model_version(name, number, text)
            whole = self._client.get_registered_model(name).description or ""
            if whole == of_model(number, version.description or ""):
                self._client.update_registered_model(name, of_model(number, text))

    def finish(self, status: str, time: int) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status, time)

    def system_metrics(self) -> Any:
        """Starts a monitor of this machine that writes to the run until `finish()`."""
        monitor = SystemMetricsMonitor(
            self.run_id, resume_logging=True, node_id=os.uname().nodename, tracking_uri=self._uri
        )
        monitor.start()
        return monitor

    def _find(self) -> str | None:
        tag = f"tags.`{_SPOOL_TAG}` = '{self._spool_id}'"
        found = self._client.search_runs([self._experiment_of_run()], tag)
        return str(found[0].info.run_id) if found else None

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
                if found.lifecycle_stage == "deleted":
                    raise UserError(deletion(self._experiment, found.experiment_id)) from None
                self._experiment_id = found.experiment_id
        return str(self._experiment_id)


def _local_artifacts(uri: str) -> str | None:
    """Keeps the artifacts of an embedded database beside the database."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def _name(key: str) -> str:
    return _NOT_IN_NAMES.sub("_", key)[:250]


def _batches(values: Iterable[Any], size: int) -> Iterable[list[Any]]:
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch
