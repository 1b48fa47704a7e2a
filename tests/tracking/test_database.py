"""MLflow's local database is whole or not there, whoever is killed while it is made."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.jobs import ROOT

pytestmark = [pytest.mark.launch, pytest.mark.long]

MAKE = """
import sys
from seer_scale.tracking.quiet import quieten
quieten()
from seer_scale.tracking.mlflow_client.database import make_database
make_database(sys.argv[1])
"""


def test_a_process_killed_while_it_makes_the_database_leaves_none(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    path = tmp_path / "mlflow.db"
    uri = f"sqlite:///{path}"
    command = [sys.executable, "-c", MAKE, uri]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    writing = path.with_name("mlflow.db.writing")
    killed = subprocess.Popen(command, env=environment)
    while not (writing.exists() and writing.stat().st_size > 100_000):  # its tables are being made
        assert killed.poll() is None
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    assert not path.exists()
    subprocess.run(command, env=environment, check=True)
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]
    before = path.stat().st_mtime_ns
    subprocess.run(command, env=environment, check=True)
    assert path.stat().st_mtime_ns == before
    MlflowClient(tracking_uri=uri).create_experiment("new")
