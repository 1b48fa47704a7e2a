"""Replies of a real MLflow server that are lost after the server has done what was asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from seer_scale.models import build_trunk
from seer_scale.serving import export_trunk
from seer_scale.tracking import sender
from seer_scale.tracking.mlflow_client.results import log_evaluation, log_study
from tests.tracking.lost_replies import LostReplies
from tests.tracking.test_delivery import Server, _environment, client, history, unsent, until

pytestmark = [pytest.mark.launch, pytest.mark.long]
__all__ = ["_environment"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    try:
        until(running.healthy, 300)
        yield running
    finally:
        running.kill()


@pytest.mark.timeout(600)
def test_a_run_arrives_once(server: Server, tmp_path: Path) -> None:
    proxy = LostReplies(server.port, spared="/code/")
    tracker = unsent(tmp_path / "lossy", f"http://127.0.0.1:{proxy.port}")
    tracker.log_params({"lr": 0.1, "trunk": "regnety_debug"})
    for step in range(30):
        tracker.log_metrics({"loss": 1 / (step + 1)}, step)
    tracker.set_tags({"kind": "test"})
    (tracker.run_dir / "config.yaml").write_text("train:\n")
    tracker.log_artifact(tracker.run_dir / "config.yaml")
    exported = tracker.run_dir / "trunk9"
    export_trunk(build_trunk("regnety_debug"), exported, trunk="regnety_debug", step=9)
    tracker.log_model(exported, step=9, aliases=["best"])
    tracker.log_checkpoint(exported, step=9, how="reference")
    tracker.close(wait_s=0)
    outcome = sender.sync(tracker.run_dir)
    proxy.stop()
    for kind in ("runs/create", "runs/log-batch", "logged-models", "model-versions/create"):
        assert f"POST /api/2.0/mlflow/{kind}" in proxy.seen
    assert (outcome.left, outcome.rejected) == (0, 0)

    known = client(server.uri())
    experiment = known.get_experiment_by_name("tests").experiment_id
    (run,) = known.search_runs([experiment])
    assert (run.info.run_id, run.info.status) == (outcome.run_id, "FINISHED")
    losses = history(server.uri(), run.info.run_id, "loss")
    assert losses == [(step, 1 / (step + 1)) for step in range(30)]
    (model,) = known.search_logged_models([experiment])
    assert (model.name, str(model.status)) == ("regnety_debug-step-9", "READY")
    (version,) = known.search_model_versions("name = 'unsent'")
    assert (version.run_id, version.source) == (run.info.run_id, f"models:/{model.model_id}")
    best = known.get_model_version_by_alias("unsent", "best")
    assert (best.version, best.tags["step"]) == (version.version, "9")


def test_an_evaluation_and_a_study_arrive_once(server: Server, tmp_path: Path) -> None:
    proxy = LostReplies(server.port, spared="/code/")
    uri = f"http://127.0.0.1:{proxy.port}"
    run_id = log_evaluation(
        uri,
        run_id=None,
        experiment="results",
        run_name="knn of a folder",
        params={"task": "knn"},
        metrics={"top1": 0.5},
        step=3,
        files=[],
        folder="evaluation",
        scratch=tmp_path,
    )
    study = log_study(
        uri,
        experiment="results",
        name="tiny",
        identity="1",
        children=[run_id],
        files=[],
        finished=True,
    )
    proxy.stop()
    known = client(server.uri())
    runs = known.search_runs([known.get_experiment_by_name("results").experiment_id])
    assert sorted(run.info.run_id for run in runs) == sorted([run_id, study])
    assert history(server.uri(), run_id, "top1") == [(3, 0.5)]
