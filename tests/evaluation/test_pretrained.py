"""Pretraining improves k-NN on rendered shapes, from random weights, through the launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.jobs import ROOT
from seer_scale.data.generate.shapes import write_shapes

POINTS = 0.15
# The demo's run (its trunk, head, objective, steps and images a step), on one process.
OVERRIDES = (
    "train.micro_batch_size=64",
    "data.color_distortion=0.3",
    # A crop holds whole figures.
    "data.crop_scales=[[0.3,1.0],[0.1,0.35]]",
    "optim.freeze_prototypes_steps=0",
    "tracking.enabled=false",
)


def python(script: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "launch" / script), *arguments]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"}, check=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_pretraining_beats_the_random_trunk_by_fifteen_points(tmp_path: Path) -> None:
    shapes = write_shapes(tmp_path / "shapes", train=2400, val=600)
    run_dir = tmp_path / "run"
    python(
        "pretrain.py",
        *("--recipe", "demo", f"data.path={shapes / 'train'}", f"run.dir={run_dir}", *OVERRIDES),
    )
    top1 = {}
    for name, model in (("random", "random:regnety_debug"), ("trained", str(run_dir))):
        out = tmp_path / f"{name}.json"
        python(
            "evaluate.py",
            *("knn", "--model", model, "--data", str(shapes), "--json", str(out)),
            *("--out", str(tmp_path / name), "--features", str(tmp_path / "features")),
            *("--mlflow-uri", "none", "size=64"),
        )
        top1[name] = json.loads(out.read_text())["metrics"]["top1"]
    assert top1["trained"] > top1["random"] + POINTS, top1
