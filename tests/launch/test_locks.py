"""File systems without locks, or with NFS's rule: every command that locks does its work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.jobs import lines
from harness.locks import environment_with
from seer_scale.data import write_tiles
from tests.data.servers import FileServer

pytestmark = [pytest.mark.launch, pytest.mark.long]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rule", ["none", "nfs", pytest.param("unknown", marks=pytest.mark.slow)])
def test_every_command_does_its_work(tmp_path: Path, rule: str) -> None:
    """A study trains on remote shards and evaluates; then a run is resumed, tracked and sent."""
    tiles = write_tiles(
        tmp_path / "tiles", train_per_photograph=2, bank_per_photograph=1, queries_per_photograph=1
    )
    server = FileServer(tiles.train)
    # MLflow itself locks a file in the folder for temporary files, which has locks.
    environment = environment_with(rule, below=tmp_path) | {
        "OMP_NUM_THREADS": "1",
        "no_proxy": "*",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def run(*command: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "seer_scale", *command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        logs = "".join(path.read_text() for path in tmp_path.glob("out/logs/*.log"))
        assert done.returncode == status, done.stdout + logs
        assert "Traceback" not in done.stdout + logs
        return done.stdout + logs

    (shard,) = tiles.train.glob("*.tar")
    url = f"http://127.0.0.1:{server.port}/{shard.name}"
    # What a killed download left, and room for one copy only.
    cache = tmp_path / "index-cache"
    (cache / "shards").mkdir(parents=True)
    (cache / "shards" / "0123.part").write_bytes(bytes(1000))
    for _ in range(2):
        said = run("data", "index", url, "--cache", str(cache), "--out", str(tmp_path / "m.jsonl"))
        assert "1 shards, version" in said
    assert not list(cache.glob("shards/*.part"))

    study = tmp_path / "study.yaml"
    study.write_text(
        yaml.safe_dump(
            {
                "name": "tiny",
                "recipe": "debug",
                "sizes": ["regnety_debug", "regnety_200mf"],
                "images": [8],
                "global_batch": 4,
                "retries": 0,
                "set": {"data.path": url, "tracking.enabled": False},
                "evaluate": {
                    "data": f"{tiles.knn_train},{tiles.knn_test}",
                    "tasks": {"knn": {"size": 32}},
                },
            }
        )
    )
    command = ("study", "--study", str(study), "--out", str(tmp_path / "out"))
    said = run(*command)
    warnings = [line for line in said.splitlines() if "has no locks" in line]
    assert bool(warnings) == (rule != "nfs"), said
    (run_dir,) = tmp_path.glob("out/runs/regnety_debug-*")
    assert len(list(tmp_path.glob("out/evaluations/*/knn.json"))) == 2
    assert "finished before" in run(*command)

    more = ["--recipe", str(run_dir / "config.yaml"), "--resume", "auto", "train.steps=3"]
    # MLflow makes its database first, which takes long: only this run is tracked.
    run("pretrain", *more, "tracking.enabled=true", "tracking.system_metrics=false")
    assert [line["step"] for line in lines(run_dir)] == [1, 2, 3]
    assert ", 0 left" in run("sync", str(run_dir))
    server.stop()
