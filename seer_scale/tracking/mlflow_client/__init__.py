"""The only package that imports mlflow; importing it takes seconds; call `quiet.quieten` first."""

from seer_scale.tracking.mlflow_client.checkpoints import find_checkpoints
from seer_scale.tracking.mlflow_client.experiments import deleted_experiment
from seer_scale.tracking.mlflow_client.models import (
    RegisteredVersion,
    current_uri,
    download_model,
    newest_version,
    register_trunk,
    run_of_model,
)
from seer_scale.tracking.mlflow_client.results import log_evaluation, log_study
from seer_scale.tracking.mlflow_client.run import MlflowRun

__all__ = [
    "MlflowRun",
    "RegisteredVersion",
    "current_uri",
    "deleted_experiment",
    "download_model",
    "find_checkpoints",
    "log_evaluation",
    "log_study",
    "newest_version",
    "register_trunk",
    "run_of_model",
]
