"""What a real MLflow refuses for good is said at the end of the run that it was refused to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.jobs import ROOT, arguments, write_images

pytestmark = [pytest.mark.launch, pytest.mark.long]


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_a_model_that_the_registry_refuses_is_said_at_the_end(tmp_path: Path) -> None:
    """A prompt has the name already: MLflow keeps prompts and models in one registry."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    code = (
        "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1])\n"
        "mlflow.genai.register_prompt('taken', 'a text')"
    )
    done = run("-c", code, uri, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    argv = arguments(
        write_images(tmp_path / "images"),
        tmp_path / "run",
        f"tracking.uri={uri}",
        "tracking.registered_name=taken",
        "tracking.system_metrics=false",
        "train.steps=2",
        "optim.warmup_steps=1",
    )
    done = run("-m", "seer_scale", "pretrain", *argv, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    file = tmp_path / "run" / "tracking" / "rejected.jsonl"
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["event"]["kind"] == "model"
    assert "warning: MLflow refused 1 record of this run for good (the last: " in done.stderr
    assert f"{file} holds each with its reason" in done.stderr
    done = run("-m", "seer_scale", "sync", str(tmp_path / "run"), folder=tmp_path)
    assert done.returncode == 1
    assert "0 events sent, 1 refused, run " in done.stdout
    assert "0 left" not in done.stdout
    assert str(file) in done.stderr
