"""launch/evaluate.py as users call it: files it writes, MLflow, processes, and wrong arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.jobs import ROOT
from seer_scale.commands.evaluate import main
from seer_scale.data.generate.shapes import write_shapes
from seer_scale.distributed.ports import free_port
from seer_scale.errors import ConfigError
from seer_scale.evaluation.session import open_model
from seer_scale.models import build_trunk
from seer_scale.serving import export_trunk

MODEL = "random:regnety_debug"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", train=96, val=48, size=40)


def launch(
    folder: Path, *arguments: str, ranks: int = 1, threads: str | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--master-port", str(free_port())]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    environment.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    return subprocess.run(
        [*command, str(ROOT / "launch" / "evaluate.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_answers_without_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['launch/evaluate.py', '--help']\n"
        "try: runpy.run_path('launch/evaluate.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'sklearn', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    for word in (
        "knn",
        "retrieval",
        "imagenet_linear",
        "temperatures to try",
        "a list of numbers; default: [0.07]",
        "lr_steps",
    ):
        assert word in done.stdout


@pytest.mark.long
@pytest.mark.launch
def test_a_result_is_the_same_under_processes_and_second_tasks_compute_no_features(
    data: Path, tmp_path: Path
) -> None:
    common = ("--model", MODEL, "--data", str(data), "size=32", "--mlflow-uri", "none")
    reports = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        done = launch(folder, "knn", *common, "--json", "r.json", "k=5", ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("computing features") == 2
        reports.append(json.loads((folder / "r.json").read_text()))
    assert [report["world_size"] for report in reports] == [1, 2]
    for key in ("metrics", "details", "task", "model", "data", "options", "preset"):
        assert reports[0][key] == reports[1][key]
    assert reports[0]["options"]["k"] == [5]
    assert reports[0]["versions"]["torch"] == torch.__version__.split("+")[0]
    (own,) = (tmp_path / "1" / "runs/evaluations").glob("knn-*/knn.json")
    assert json.loads(own.read_text())["metrics"] == reports[0]["metrics"]
    assert {path.name for path in own.parent.glob("*.png")} == {"confusion.png", "neighbours.png"}
    again = launch(tmp_path / "1", "retrieval", *common)
    assert again.returncode == 0, again.stderr
    assert "computing features" not in again.stderr


@pytest.mark.long
@pytest.mark.launch
def test_a_model_of_no_run_gets_a_run_of_its_own(data: Path, tmp_path: Path) -> None:
    trunk = export_trunk(build_trunk("regnety_debug"), tmp_path / "trunk", trunk="regnety_debug")
    done = launch(
        tmp_path, "knn", "--model", str(trunk), "--data", str(data), "size=32", threads="1"
    )
    assert done.returncode == 0, done.stderr
    assert "logged under MLflow run" in done.stderr
    code = (
        "import json\n"
        "from mlflow import MlflowClient\n"
        "client = MlflowClient('sqlite:///mlflow.db')\n"
        "experiment = client.get_experiment_by_name('seer-scale-evaluation')\n"
        "(run,) = client.search_runs([experiment.experiment_id])\n"
        "files = [f.path for f in client.list_artifacts(run.info.run_id, 'evaluation/knn')]\n"
        "print(json.dumps([run.data.metrics, run.data.params, files]))"
    )
    asked = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    metrics, params, files = json.loads(asked.stdout.splitlines()[-1])
    (own,) = (tmp_path / "runs/evaluations").glob("knn-*/knn.json")
    report = json.loads(own.read_text())
    assert metrics == {f"eval/knn/{name}": value for name, value in report["metrics"].items()}
    assert params["trunk"] == "regnety_debug"
    names = ("confusion.png", "knn.json", "neighbours.png")
    assert files == [f"evaluation/knn/{name}" for name in names]


@pytest.mark.long
@pytest.mark.launch
def test_a_server_that_is_down_costs_a_warning(data: Path, tmp_path: Path) -> None:
    done = launch(
        tmp_path,
        *("knn", "--model", MODEL, "--data", str(data), "size=32", "--json", "r.json"),
        *("--mlflow-uri", f"http://someone:secret@127.0.0.1:{free_port()}"),
    )
    assert done.returncode == 0, done.stderr
    assert "warning: MLflow has not got the result" in done.stderr
    assert "secret" not in done.stderr
    assert "top1" in json.loads((tmp_path / "r.json").read_text())["metrics"]


def test_a_random_trunk_is_that_of_its_seed() -> None:
    first, same, other = (open_model(f"{MODEL}{seed}") for seed in ("", ":0", ":1"))
    weights = [trunk.state_dict()["stem.0.weight"] for trunk in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not first.training
    with pytest.raises(ConfigError, match="the seed 'x' is not an integer >= 0"):
        open_model(f"{MODEL}:x")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["knnn", "--model", "m", "--data", "d"], r"knnn is not a task: did you mean knn\?"),
        (["knn", "--data", "d"], "the following arguments are required: --model"),
        (
            ["knn", "--model", "m", "--data", "d", "--preset", "kn"],
            "kn is not a preset: did you mean",
        ),
        (
            ["knn", "--model", "m", "--data", "d", "--preset", "voc07_svm"],
            "--preset voc07_svm belongs to the task svm: the task knn has knn",
        ),
        (["knn", "--model", "m", "--data", "d", "--fast", "k=3"], "--fast is not an option"),
        (
            ["knn", "--model", "m", "--data", "d", "kk=3"],
            "task knn: kk is not a key: did you mean k",
        ),
        (["knn", "--model", "m", "--data", "d", "--labels", "no.csv"], "no.csv is not a file"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.long
@pytest.mark.launch
def test_labels_that_do_not_match_and_unseen_classes_end_with_a_sentence(
    data: Path, tmp_path: Path
) -> None:
    images = sorted(str(path.relative_to(data)) for path in data.rglob("*.png"))
    lines = [f"{name},{index % 3}" for index, name in enumerate(images)]
    (tmp_path / "few.csv").write_text("name,class\n" + "\n".join(lines[:-10]) + "\n")
    common = ("knn", "--model", MODEL, "size=32", "--mlflow-uri", "none")
    done = launch(tmp_path, *common, "--data", str(data), "--labels", "few.csv", threads="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the labels few.csv have no line for")
    assert "Traceback" not in done.stderr
    other = tmp_path / "other"
    (other / "train").mkdir(parents=True)
    (other / "train" / "disc").symlink_to(data / "train" / "disc")
    (other / "val").symlink_to(data / "val")
    done = launch(tmp_path, *common, "--data", str(other), threads="1")
    assert done.returncode == 1
    assert "11 classes are in the validation part only (checks, dots, frame, ...)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("home", [False, True])
def test_a_run_gets_its_knn_at_the_step_of_the_trunk_that_was_judged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: bool
) -> None:
    """The newest checkpoint has no trunk yet, as while the run goes on."""
    run_dir = tmp_path / "run"
    trunk = open_model(MODEL)
    export_trunk(trunk, run_dir / "checkpoints" / "step_00000002" / "trunk", trunk="regnety_debug")
    (run_dir / "checkpoints" / "step_00000004").mkdir()
    (run_dir / "metrics.jsonl").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    model = "~/run" if home else str(run_dir)
    done = launch(tmp_path, "knn", "--model", model, "--data", str(data), "size=32")
    assert done.returncode == 0, done.stderr
    (kept,) = (run_dir / "eval").iterdir()
    assert kept.name == "knn_step_00000002.json"
    assert "size" in json.loads(kept.read_text())
