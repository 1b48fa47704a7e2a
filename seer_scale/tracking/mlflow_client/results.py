"""Results after training: evaluations below the run, studies above it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from seer_scale.errors import UserError
from seer_scale.tracking.context import context
from seer_scale.tracking.mlflow_client.database import make_database
from seer_scale.tracking.mlflow_client.requests import found_or_created
from seer_scale.tracking.mlflow_client.run import MlflowRun
from seer_scale.tracking.uri import one_line, redact

_STUDY_TAG = "seer_scale.study"
_KNN = "eval/knn/top1"  # the metric that descriptions of models show
_PARENT_TAG = "mlflow.parentRunId"  # what MLflow's pages nest by


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
    """Creates or updates the parent run of a study, with its child runs and its report.

    Args:
        uri: address of the server.
        experiment: name of the experiment that parent and children are in.
        name: name of the parent run.
        identity: key of the study; the same one keeps its parent run.
        children: ids of the runs of its points.
        files: to be kept as artifacts.
        finished: whether no point is left.

    Returns:
        The parent's run id.

    Raises:
        UserError: if the server does not answer, or refuses.
    """
    make_database(uri)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        known = client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else client.create_experiment(experiment)
        same = f"tags.`{_STUDY_TAG}` = '{identity}'"
        run = found_or_created(
            lambda: next(iter(client.search_runs([number], same)), None),
            lambda: client.create_run(number, tags={_STUDY_TAG: identity}, run_name=name),
        )
        run_id = str(run.info.run_id)
        for child in children:
            client.set_tag(child, _PARENT_TAG, run_id)
        for file in files:
            client.log_artifact(run_id, str(file), "report")
        client.update_run(run_id, status="FINISHED" if finished else "RUNNING")
    except MlflowException as error:
        raise UserError(f"the study is not kept at {redact(uri)}: {one_line(error)}") from None
    return run_id


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
    """Logs metrics and files under a run, whose status stays, or under a new run.

    Args:
        uri: address of the server, with credentials.
        run_id: id of the run, if there is one.
        experiment: name of the experiment of a run of its own.
        run_name: name of a run of its own, which the same name finds again.
        params: parameters of a run of its own.
        metrics: values by name.
        step: step of the model.
        files: to be uploaded.
        folder: folder of the run's artifacts that they go to.
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
        run.set_tags(context())
        run.log_params(params)
    run.log_metrics((name, value, now, step) for name, value in metrics.items())
    for file in files:
        run.log_artifact(file, folder)
    if own:
        run.finish("FINISHED", now)
    elif _KNN in metrics:
        run.describe_knn(step, metrics[_KNN])
    return str(run.run_id)
