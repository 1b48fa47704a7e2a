"""launch/pretrain.py as users start it: launchers, exit statuses, signals, MLflow."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.jobs import ROOT, arguments, lines, write_images
from seer_scale.checkpoint import CheckpointReader, list_checkpoints
from seer_scale.data import write_tiles
from seer_scale.distributed.ports import free_port

pytestmark = pytest.mark.launch

BIN = Path(sys.executable).parent
PRETRAIN = str(ROOT / "launch" / "pretrain.py")
PYTHON = [sys.executable, PRETRAIN]
SEER_SCALE = [sys.executable, "-m", "seer_scale"]


def environment(folder: Path) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")},
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


def launch(
    command: list[str], folder: Path, seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def test_deepspeed_trains_and_registers(images: Path, tmp_path: Path) -> None:
    command = [
        *("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), PRETRAIN),
        *arguments(images, tmp_path / "run", "tracking.registered_name=seer-test"),
        *("--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json")),
        *("tracking.system_metrics=false", "train.micro_batch_size=2"),
    ]
    done = launch(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines(tmp_path / "run")) == 8
    assert "step 8/8" in done.stderr
    assert "regnety_debug, 0.24M parameters, zero2, 2 x cpu" in done.stderr
    *_, trunk_line, _, evaluate, convert, show, serve = done.stderr.split("finished: ")[
        1
    ].splitlines()
    run = tmp_path / "run"
    # Version 1 is of step 4.
    assert (
        trunk_line
        == f"trunk: {run}/checkpoints/step_00000008/trunk, version 2 of seer-test in MLflow"
    )
    assert evaluate == f"  seer-scale evaluate knn --model {run} --data LABELLED size=32"
    assert convert == f"  seer-scale convert {run} --to huggingface --out exports/run-huggingface"
    assert show == (
        f"  mlflow server --host 127.0.0.1 --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
        "   # shows the run at http://127.0.0.1:5000"
    )
    assert serve.endswith(
        "models serve --env-manager local --port 5001 --model-uri models:/seer-test/2"
    )
    exported = launch([*SEER_SCALE, *shlex.split(convert)[1:]], tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "exports/run-huggingface/preprocessor_config.json").is_file()

    # What was registered has the checkpoint's features, through MLflow and through our call.
    judge = """
import sys, numpy as np, mlflow, seer_scale
images = np.load("images.npy")
served = mlflow.pyfunc.load_model("models:/seer-test@latest").predict(images)
import torch
with torch.inference_mode():
    called = seer_scale.load("models:/seer-test@latest")(torch.from_numpy(images)).numpy()
assert np.array_equal(served, called)
np.save("features.npy", served)
runs = mlflow.search_runs(experiment_names=["seer-scale"])
assert len(runs) == 1, runs
assert runs.iloc[0].status == "FINISHED"
client = mlflow.MlflowClient()
assert client.get_model_version("seer-test", "2").tags["step"] == "8"
best = client.get_model_version_by_alias("seer-test", "best")
print(runs.iloc[0].run_id, best.tags["step"])
"""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.standard_normal((2, 3, 64, 64), dtype=np.float32))
    judged = launch([sys.executable, "-P", "-c", judge], tmp_path)
    assert judged.returncode == 0, judged.stderr
    run_id = judged.stdout.split()[-2]
    assert run_id in done.stderr  # what the trainer said is the one run there is
    features = np.load(tmp_path / "features.npy")
    trunk = checkpoint_trunk(tmp_path / "run")
    with torch.inference_mode():
        expected = trunk(torch.from_numpy(np.load(tmp_path / "images.npy"))).numpy()
    # Another process: matrix products of MKL depend on how its memory is aligned, seen on an AMD
    # EPYC as differences of 1e-7 in half of the runs. A wrong weight would differ by far more.
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


def checkpoint_trunk(run_dir: Path) -> torch.nn.Module:
    """The newest checkpoint's trunk, put together from its slices rather than from its export."""
    from seer_scale.models import build_trunk

    reader = CheckpointReader(list_checkpoints(run_dir / "checkpoints")[-1])
    trunk = build_trunk("regnety_debug")
    trunk.load_state_dict({name: reader.whole(f"trunk.{name}") for name in trunk.state_dict()})
    return trunk.eval()


@pytest.mark.slow
def test_torchrun_trains(images: Path, tmp_path: Path) -> None:
    command = [
        *("torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), PRETRAIN),
        *arguments(images, tmp_path / "run", "train.steps=3", "train.precision=bf16"),
        "optim.warmup_steps=1",
    ]
    done = launch(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "run")) == 3


@pytest.mark.slow
def test_plain_python_runs_zero_alone(images: Path, tmp_path: Path) -> None:
    argv = arguments(images, tmp_path / "run", "train.steps=3", "optim.warmup_steps=1")
    config = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero3.json")]
    done = launch([*PYTHON, *argv, *config], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert len(lines(tmp_path / "run")) == 3


@pytest.mark.long
@pytest.mark.parametrize(
    ("signum", "status"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_resuming_goes_on(
    images: Path, tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(images, run_dir, "train.steps=4000", "checkpoint.every=5000")
    with subprocess.Popen(
        [*PYTHON, *argv], cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists() or len(lines(run_dir)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "--resume auto" in errors
    (saved,) = list_checkpoints(run_dir / "checkpoints")
    step = int(saved.name.removeprefix("step_"))
    assert lines(run_dir)[-1]["step"] == step >= 3
    more = [*arguments(images, run_dir, f"train.steps={step + 2}"), "--resume", "auto"]
    done = launch([*PYTHON, *more], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(run_dir)] == list(range(1, step + 3))


def test_resuming_a_finished_run_says_so(images: Path, tmp_path: Path) -> None:
    """It ends with the same last words and status 0, and changes nothing."""
    argv = arguments(images, tmp_path / "run", "train.steps=2", "optim.warmup_steps=1")
    first, again = (
        launch([*PYTHON, *argv, *more], tmp_path) for more in ([], ["--resume", "auto"])
    )
    assert first.returncode == again.returncode == 0, again.stderr
    last = first.stderr[first.stderr.index("finished: step 2 of 2 ") :]
    assert "not sent to MLflow" in last
    assert "models serve" not in last
    assert again.stderr == (
        "--resume auto: step 2 is done and train.steps is 2, so nothing is left to train; "
        f"a larger train.steps goes on, at the learning rates of the longer run\n{last}"
    )
    more = [*argv[:-2], "train.steps=3", "optim.warmup_steps=1", "--resume", "auto"]
    done = launch([*PYTHON, *more], tmp_path)
    assert "nothing is left" not in done.stderr
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


MISTAKES = {
    "missing data": (["data.path=nowhere"], 1, ["nowhere"]),
    "empty folder": (["data.path=empty"], 1, ["empty"]),
    "no images": (["data.path=text"], 1, ["text"]),
    "unknown trunk": (["model.trunk=regnety_25gf"], 2, ["regnety_25gf", "regnety_256gf"]),
    "unknown objective": (["objective.name=swaw"], 2, ["swaw", "swav"]),
    "unknown option": (["objective.epsilom=1"], 2, ["epsilom", "epsilon"]),
    "unknown key": (["train.stepz=1"], 2, ["train.stepz", "train.steps"]),
    "contradiction": (
        ["--deepspeed_config", "wrong.json"],
        2,
        ["train_micro_batch_size_per_gpu", "99", "4"],
    ),
    "groups of another trunk": (
        [
            "sharding.activation_checkpointing=groups",
            "sharding.checkpoint_groups=[[2], [7], [9, 17], []]",
        ],
        2,
        ["checkpoint_groups", "4 lists", "3 stages"],
    ),
    "tracking folder": (["tracking.uri=./mlruns"], 2, ["./mlruns"]),
    "no checkpoint": (["--resume", "empty"], 1, ["empty", "checkpoint"]),
    "half a checkpoint": (["--resume", "step_00000007"], 1, ["step_00000007", "manifest"]),
    "queue does not divide": (["objective.queue_length=-4"], 2, ["queue_length", "-4"]),
}


# Each starts a process; the sentences themselves are tested where they are made.
ALWAYS = {"missing data", "unknown trunk", "contradiction", "no checkpoint", "tracking folder"}


@pytest.mark.parametrize(
    "mistake",
    [m if m in ALWAYS else pytest.param(m, marks=pytest.mark.slow) for m in MISTAKES],
)
def test_a_mistake_is_one_sentence(images: Path, tmp_path: Path, mistake: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "step_00000007").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    (tmp_path / "wrong.json").write_text(
        '{"train_micro_batch_size_per_gpu": 99, "zero_optimization": {"stage": 2}}'
    )
    more, status, fragments = MISTAKES[mistake]
    argv = arguments(images, tmp_path / "run")
    given = {word.split(".")[0] for word in more if word.startswith(("data.path=", "tracking."))}
    argv = [
        word
        for word in argv
        if not word.startswith(("data.path=", "tracking.")) or word.split(".")[0] not in given
    ]
    done = launch([*PYTHON, *argv, *more], tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(fragment in done.stderr for fragment in fragments), done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_under_a_launcher_the_sentence_is_said_once(images: Path, tmp_path: Path) -> None:
    command = [
        *("deepspeed", "--quiet", "--num_gpus", "2", "--master_port", str(free_port()), PRETRAIN),
        *arguments(images, tmp_path / "run", "model.trunk=regnety_25gf"),
    ]
    done = launch(command, tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    tiles = write_tiles(
        tmp_path / "tiles",
        train_per_photograph=2,
        bank_per_photograph=1,
        queries_per_photograph=1,
    )
    (shard,) = tiles.train.glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-20_000])
    done = launch([*PYTHON, *arguments(tiles.train, tmp_path / "run")], tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert shard.name in done.stderr


def test_help_is_quick_and_lists_every_key() -> None:
    done = launch([*PYTHON, "--help"], ROOT, seconds=30)
    assert done.returncode == 0
    for key in ("run.log_samples", "sharding.sync_bn_group_size", "tracking.registered_name"):
        assert key in done.stdout
