"""Files written before the package was laid out anew still load, resume and predict.

tests/specimens/make.py made them at an earlier commit; nothing here but launch/*.py,
`seer_scale.load` and mlflow touches them, so the tests stay true however the modules move.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import seer_scale
from tests.specimens.make import (
    GOING_ON,
    HERE,
    KNN,
    MODEL,
    MORE_STEPS,
    POINT,
    ROOT,
    RUN,
    TRUNKS,
    fine_tune,
    go_on,
    launch,
    read_lines,
    unpack,
)

EXPECTED: dict[str, Any] = json.loads((HERE / "expected.json").read_text())
# Kernels of other processors add in another order. A lost momentum or queue changes the losses by
# far more.
LOSS_TOLERANCE = 1e-4
FEATURE_TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}  # for the same reason


@pytest.fixture(autouse=True)
def _specimens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fresh copy of all specimens as the current folder."""
    monkeypatch.chdir(unpack(tmp_path))
    before = dict(os.environ)  # commands tell mlflow its server through the environment
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    yield
    os.environ.clear()
    os.environ.update(before)


def command(name: str, *arguments: str) -> None:
    """Runs launch/NAME.py in this process and sees it succeed."""
    script = str(ROOT / "launch" / f"{name}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(os, "_exit", sys.exit)  # how commands leave after a mistake
        with pytest.raises(SystemExit) as left:
            runpy.run_path(script, run_name="__main__")
    assert left.value.code == 0


def features_of(trunk: torch.nn.Module) -> Any:
    with torch.inference_mode():
        return trunk(torch.from_numpy(np.load("expected/images.npy"))).numpy()


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize("name", GOING_ON)
def test_a_run_resumes(name: str) -> None:
    """From its own folder under ddp and ZeRO 2, and on one rank from the copy in MLflow."""
    came = go_on(name, EXPECTED["run_id"])
    assert came["samples"] == EXPECTED[name]["samples"]
    assert came["losses"] == pytest.approx(EXPECTED[name]["losses"], rel=LOSS_TOLERANCE)
    if name == "ddp":  # the same MLflow run has what came after
        sent = json.loads(Path(RUN, "tracking/sent.json").read_text())
        assert (sent["run_id"], sent["steps"]["loss"]) == (EXPECTED["run_id"], MORE_STEPS)


@pytest.mark.long
@pytest.mark.launch
def test_a_run_goes_on_with_its_own_numbers_where_its_recipe_has_others() -> None:
    """As after an update: the recipe says images and a global batch now, the run has neither."""
    recipe = yaml.safe_load(Path(RUN, "config.yaml").read_text())
    assert recipe["train"].keys() & {"images", "global_batch"} == set()
    for key in ("steps", "gradient_accumulation"):
        del recipe["train"][key]
    recipe["train"] |= {"images": 960, "global_batch": 12, "micro_batch_size": 3}
    for key in ("warmup_steps", "freeze_prototypes_steps"):
        del recipe["optim"][key]
    recipe["optim"] |= {"warmup_share": 0.5, "freeze_prototypes_share": 0.9}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    more = (f"train.steps={MORE_STEPS}", "tracking.log_models=false", "--resume", "auto")
    launch("pretrain", "--recipe", "mine.yaml", *more, ranks=2)
    losses = [line["loss"] for line in read_lines(Path(RUN, "metrics.jsonl"))]
    assert read_lines(Path(RUN, "samples.jsonl")) == EXPECTED["ddp"]["samples"]
    assert losses == pytest.approx(EXPECTED["ddp"]["losses"], rel=LOSS_TOLERANCE)
    written = yaml.safe_load(Path(RUN, "config.yaml").read_text())
    assert [written["train"][key] for key in ("steps", "micro_batch_size", "global_batch")] == [
        *(MORE_STEPS, 2, 4)
    ]


@pytest.mark.parametrize("path", [f"{RUN}/checkpoints", "zero2", "finetuned/checkpoints"])
def test_a_checkpoint_is_whole(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    command("checkpoint", "verify", path)
    command("checkpoint", "inspect", path)
    assert "regnety_debug" in capsys.readouterr().out
    command("checkpoint", "consolidate", path, "--to", "whole", "--momentum")
    assert any(Path("whole").glob("*.safetensors"))


@pytest.mark.parametrize("source", TRUNKS)
def test_a_trunk_gives_its_features(source: str) -> None:
    features = features_of(seer_scale.load(TRUNKS[source]))
    np.testing.assert_allclose(features, np.load("expected/features.npy"), **FEATURE_TOLERANCE)


def test_a_trunk_and_its_head_are_converted() -> None:
    command("convert", "exports/with_head", "--to", "torchvision", "--out", "again.pth")
    command("convert", "again.pth", "--to", "safetensors", "--out", "again")
    head = "head.safetensors"
    assert Path("again", head).read_bytes() == Path("exports/with_head", head).read_bytes()


JUDGE = """
import json, sys
import mlflow, numpy as np, torch
import seer_scale.serving

def predict():
    predicted = mlflow.pyfunc.load_model(f"models:/{sys.argv[1]}@best").predict(images)
    return [sys.modules["seer_scale.serving"].__file__, predicted.tolist()]

images = np.load("expected/images.npy")
today = predict()
with torch.inference_mode():
    loaded = seer_scale.load(f"models:/{sys.argv[1]}@latest")(torch.from_numpy(images)).tolist()
for name in [name for name in sys.modules if name.startswith("seer_scale")]:
    del sys.modules[name]
print(json.dumps([today, ["", loaded], predict()]))
"""


@pytest.mark.long
@pytest.mark.launch
def test_a_registered_model_predicts() -> None:
    """Through mlflow with this code, through `load`, and with the code that the model carries."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", JUDGE, MODEL],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for _, features in answers:
        np.testing.assert_allclose(features, np.load("expected/features.npy"), **FEATURE_TOLERANCE)
    assert Path(answers[0][0]).is_relative_to(ROOT)
    assert not Path(answers[2][0]).is_relative_to(ROOT)


def test_features_are_not_computed_again(capsys: pytest.CaptureFixture[str]) -> None:
    command("evaluate", *KNN, "--json", "knn.json")
    assert "computing features" not in capsys.readouterr().err
    assert json.loads(Path("knn.json").read_text())["metrics"] == EXPECTED["knn"]


@pytest.mark.launch
def test_a_killed_fine_tuning_goes_on() -> None:
    assert fine_tune() == pytest.approx(EXPECTED["finetune"], rel=LOSS_TOLERANCE)
    assert features_of(seer_scale.load("finetuned/trunk")).shape == (2, 152)


@pytest.mark.long
def test_a_study_knows_its_finished_point(capsys: pytest.CaptureFixture[str]) -> None:
    study = ("--study", "study.yaml", "--out", "study")
    command("scaling_study", *study, "--dry-run")
    states = [line for line in capsys.readouterr().out.splitlines() if line.startswith("regnety")]
    assert [line.split()[-1] for line in states] == ["finished", "do"]
    command("scaling_study", *study, "--report")
    page = Path("study/report/report.html").read_text()
    assert POINT in page
    assert "knn" in page


@pytest.mark.long
def test_a_spool_is_delivered(capsys: pytest.CaptureFixture[str]) -> None:
    command("sync", "zero2", "--uri", "sqlite:///other.db")
    said = capsys.readouterr().out
    assert " 0 left, run " in said
    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///other.db", registry_uri="sqlite:///other.db")
    run = client.get_run(said.split()[-1])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["loss"] == read_lines(Path("zero2/metrics.jsonl"))[-1]["loss"]
    assert client.get_model_version_by_alias("seer-debug", "best")


def test_a_manifest_and_its_shards_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    command("data", "inspect", "shards/shards.jsonl", "--out", "crops.png")
    assert "24 images" in capsys.readouterr().out
    assert Path("crops.png").stat().st_size > 0
    command("data", "index", "shards/shards.jsonl", "--out", "shards/again.jsonl")
    again, before = (read_lines(Path("shards", name)) for name in ("again.jsonl", "shards.jsonl"))
    indexes = [line.pop("index") for line in again]  # which older manifests have not
    assert all(Path("shards", index).is_file() for index in indexes)
    assert again == before
