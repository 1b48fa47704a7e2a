"""Experiments of an MLflow server: created or found, and said to be deleted."""

from __future__ import annotations

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from seer_scale.errors import UserError
from seer_scale.tracking.uri import one_line, redact


def deleted_experiment(uri: str, name: str) -> str | None:
    """One sentence if the experiment of this name is deleted; None if it is not, or not there yet.

    Raises:
        UserError: the server does not answer, or refuses.
    """
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        found = client.get_experiment_by_name(name)
    except MlflowException as error:
        raise UserError(f"{redact(uri)} does not say: {one_line(error)}") from None
    if found is None or found.lifecycle_stage == "active":
        return None
    return deletion(name, found.experiment_id)


def deletion(name: str, number: str) -> str:
    """The sentence about a deleted experiment: how it is restored, and what then sends the run."""
    return (
        f"the experiment {name} is deleted on the server: restore it with `mlflow experiments "
        f"restore --experiment-id {number}`, and `seer-scale sync` sends everything; or name "
        "another tracking.experiment"
    )
