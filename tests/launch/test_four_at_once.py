"""Several runs started at once in an empty folder: each arrives in the database made meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.jobs import ROOT, arguments, write_images

pytestmark = [pytest.mark.launch, pytest.mark.long]


@pytest.mark.timeout(1200)
def test_four_runs_arrive(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    images, here = write_images(tmp_path / "images"), tmp_path / "empty"
    here.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    runs = [
        subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "launch" / "pretrain.py")),
                *arguments(images, f"runs/{number}", "tracking.system_metrics=false"),
                *("train.steps=3", f"run.seed={number}"),
            ],
            cwd=here,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(4)
    ]
    for run in runs:
        said, _ = run.communicate(timeout=900)
        assert run.returncode == 0, said
        assert "Traceback" not in said
    sync = [sys.executable, "-m", "seer_scale", "sync", *(f"runs/{n}" for n in range(4))]
    done = subprocess.run(
        sync, cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(", 0 left, ") == 4
    client = MlflowClient(tracking_uri=f"sqlite:///{here}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    arrived = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.params["run.dir"] for run in arrived) == [f"runs/{n}" for n in range(4)]
    for run in arrived:
        assert run.info.status == "FINISHED"
        points = client.get_metric_history(run.info.run_id, "loss")
        assert sorted(point.step for point in points) == [1, 2, 3]
