"""A real study: killed half way and started again it repeats nothing and ends in its report."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from seer_scale.checkpoint import list_checkpoints
from seer_scale.commands.study import main
from seer_scale.data import write_tiles
from seer_scale.errors import ConfigError, UserError
from seer_scale.studies.commands import open_study

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["regnety_debug", "regnety_200mf"]


def study_file(folder: Path, **changes: object) -> Path:
    content = {
        "name": "tiny",
        "recipe": "debug",
        "sizes": SIZES,
        "images": [16],
        "global_batch": 4,
        "retries": 0,
        "set": {
            "data.path": str(folder / "tiles" / "train"),
            "tracking.uri": f"sqlite:///{folder}/mlflow.db",
            "tracking.system_metrics": False,
        },
        "evaluate": {
            "data": f"{folder}/tiles/knn_train,{folder}/tiles/knn_test",
            "tasks": {"knn": {"size": 32}},
        },
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def start(path: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "launch/scaling_study.py", "--study", str(path), "--out", str(out)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{path.parent}/mlflow.db"}
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_study_repeats_no_finished_point(tmp_path: Path) -> None:
    write_tiles(tmp_path / "tiles")
    path, out = study_file(tmp_path), tmp_path / "out"
    first = start(path, out, tmp_path / "first.log")
    finished = out / "evaluations" / "regnety_debug-swav-16-seed0" / "knn.json"
    deadline = time.monotonic() + 400
    while not finished.exists():
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {file: file.stat().st_mtime_ns for file in _files(out, SIZES[0])}
    second = start(path, out, tmp_path / "second.log")
    assert second.wait(500) == 0, (tmp_path / "second.log").read_text()
    said = (tmp_path / "second.log").read_text()
    asked = f"seer-scale study --study {path} --out {out} --status"
    assert said.startswith(f"how far it is, at any time: {asked}\n")
    log = out / "logs" / "regnety_200mf-swav-16-seed0.log"
    assert f"[2/2] regnety_200mf-swav-16-seed0: 4 steps, log {log}\n" in said
    assert log.is_file()
    assert "[1/2] regnety_debug-swav-16-seed0: finished before" in said
    assert {file: file.stat().st_mtime_ns for file in before} == before
    for size in SIZES:
        folder = out / "runs" / f"{size}-swav-16-seed0"
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
        assert steps == [1, 2, 3, 4]
    page = (out / "report" / "report.html").read_text()
    assert all(f"{size}-swav-16-seed0" in page for size in SIZES)
    assert "MLflow run of the study" in said
    assert main(["--study", str(path), "--out", str(out), "--report"]) == 0


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("signum", "processes", "status"),
    [
        (signal.SIGUSR1, 1, 75),
        # A launcher that SIGUSR1 would kill.
        pytest.param(signal.SIGTERM, 2, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 1, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_a_study_after_its_run_has_saved(
    tmp_path: Path, signum: signal.Signals, processes: int, status: int
) -> None:
    write_tiles(tmp_path / "tiles")
    settings = {"data.path": str(tmp_path / "tiles" / "train"), "tracking.enabled": False}
    path = study_file(tmp_path, images=[400_000], processes=processes, set=settings)
    out, log = tmp_path / "out", tmp_path / "log"
    run_dir = out / "runs" / f"{SIZES[0]}-swav-400000-seed0"
    last = 0
    for _ in range(2):  # the second goes on where the first was stopped
        study = start(path, out, log)
        deadline = time.monotonic() + 200
        while last_step(run_dir) < last + 3:
            assert study.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        study.send_signal(signum)
        assert study.wait(120) == status, log.read_text()
        last = last_step(run_dir)
        # The run has ended before the study, and what it has done is saved.
        assert not (run_dir / ".owner").exists()
        assert not (out / ".owner").exists()
        assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step_{last:08d}"
        assert status == 130 or "start it again with the same command" in log.read_text()
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]
    assert steps == list(range(1, last + 1))


def last_step(run_dir: Path) -> int:
    """The last step that a run has recorded; 0 before there is any."""
    file = run_dir / "metrics.jsonl"
    whole = file.read_text().splitlines() if file.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


def _files(out: Path, size: str) -> list[Path]:
    run = out / "runs" / f"{size}-swav-16-seed0"
    return [run / "metrics.jsonl", run / "config.yaml", *run.glob("checkpoints/*/manifest.json")]


@pytest.mark.long
def test_a_dry_run_prices_every_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = study_file(tmp_path)
    assert main(["--study", str(path), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for size in SIZES:
        (line,) = [line for line in lines if line.startswith(size)]
        assert line.endswith("to do")
        assert "GiB" in line
    assert re.search(
        r"2 points on 1 rank of cpu: the planner counts at least \d+\.\d seconds of training",
        lines[-1],
    )
    assert not (tmp_path / "out").exists()


def test_a_slurm_array_runs_what_is_left(tmp_path: Path) -> None:
    path, script = study_file(tmp_path, evaluate=None), tmp_path / "study.sbatch"
    command = ["--study", str(path), "--out", str(tmp_path), "--slurm", str(script)]
    assert main(command) == 0
    assert "#SBATCH --array=0,1\n" in script.read_text()
    _, _, (point, _) = open_study(path, tmp_path)
    (point.folder / "checkpoints" / f"step_{point.steps:08d}").mkdir(parents=True)  # finished
    assert main(command) == 0
    text = script.read_text()
    assert "#SBATCH --array=1\n" in text
    assert text.endswith("--point $SLURM_ARRAY_TASK_ID\n")
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.long
def test_a_point_that_cannot_fit_is_named(tmp_path: Path) -> None:
    path = study_file(tmp_path, sizes=["regnety_debug", "rg_10b"], hardware="v100_32gb")
    with pytest.raises(ConfigError, match=r"rg_10b-swav-16-seed0 needs .* GiB"):
        main(["--study", str(path), "--out", str(tmp_path / "out"), "--dry-run"])


def test_there_is_nothing_to_report_before_a_point_is_finished(tmp_path: Path) -> None:
    path = study_file(tmp_path)
    with pytest.raises(UserError, match="no point of the study"):
        main(["--study", str(path), "--out", str(tmp_path / "out"), "--report"])
