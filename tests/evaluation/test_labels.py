"""`evaluate --labels FILE` reaches every task that reads labels, under each of its methods."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seer_scale.commands.evaluate import main
from seer_scale.evaluation import session
from seer_scale.evaluation.session import Request, run_task
from tests.evaluation.patterns import context, write_patterns

TUNING = {"batch": 8, "epochs": 1, "size": 32, "workers": 1}
# Options by task and method.
TASKS: dict[str, tuple[str, ...]] = {
    "knn": ("size=32", "k=3"),
    "linear": ("size=32", "epochs=1", "batch=8"),
    "lowshot": ("size=32", "fractions=[0.5]"),
    "lowshot finetune": ("method=finetune", "fractions=[0.5]", f"finetune={TUNING}"),
    "finetune": tuple(f"{key}={value}" for key, value in TUNING.items()),
    "transfer linear": ("method=linear", "options={size: 32, epochs: 1, batch: 8}"),
    "transfer finetune": ("method=finetune", f"options={TUNING}"),
    "svm": ("size=32", "costs=[1.0]"),
    "retrieval": ("size=32",),
}


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images without any label in their layout, and a file that labels them."""
    root = tmp_path_factory.mktemp("unlabelled")
    write_patterns(root / "patterns", train=24, val=8)
    lines = []
    for part in ("train", "val"):
        (root / "images" / part).mkdir(parents=True)
        for path in sorted((root / "patterns" / part).rglob("*.png")):
            shutil.copy(path, root / "images" / part / path.name)
            upright = path.name.startswith(("bars", "rows"))
            lines.append(f"{path.name},{'lines' if upright else 'areas'}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root / "images", root / "labels.csv"


@pytest.mark.parametrize("name", TASKS)
def test_labels_given_are_labels_used(
    unlabelled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data, labels = unlabelled
    asked: list[Request] = []
    monkeypatch.setattr(session, "evaluate", asked.append)
    task, _, _ = name.partition(" ")
    argv = ["--model", "random:regnety_debug", "--data", str(data), "--labels", str(labels)]
    assert main([task, *argv, *TASKS[name]]) == 0
    (request,) = asked
    own = replace(context(tmp_path, data), labels=request.labels)
    details: dict[str, Any] = run_task(task, own, request.options).details
    assert details.get("classes", 2) == 2
