"""Imports go downwards only, and docs/design.md draws them as they are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from docs import generate_layers
from harness.jobs import ROOT
from harness.layers import find_modules, violations

TORCH_FREE = [
    "seer_scale",
    "seer_scale.errors",
    "seer_scale.config",
    *sorted(f"seer_scale.config.{file.stem}" for file in ROOT.glob("seer_scale/config/*.py")),
    # --help answers at once
    *sorted(f"seer_scale.commands.{file.stem}" for file in ROOT.glob("seer_scale/commands/*.py")),
]


def test_imports_go_down() -> None:
    modules = find_modules(ROOT)
    assert {
        "seer_scale.train.trainer",
        "seer_scale.parallel.zero",
        "launch.pretrain",
    } <= modules.keys()
    assert violations(ROOT) == []


def test_the_table_and_the_drawing_are_what_the_imports_say() -> None:
    again = "run `python docs/generate_layers.py`"
    text = generate_layers.PAGE.read_text()
    assert generate_layers.with_table(text) == text, again
    assert generate_layers.DRAWING.read_text() == generate_layers.drawing(), again


def test_the_table_changes_with_the_imports(tmp_path: Path) -> None:
    write_tree(tmp_path, GOOD)
    before = generate_layers.rooms(tmp_path)
    write_tree(tmp_path, {"seer_scale/train/trainer.py": "from seer_scale.models import heads"})
    after = generate_layers.rooms(tmp_path)
    assert before != after
    assert next(room.imports for room in after if room.name == "train") == ["models"]


GOOD = {
    "launch/pretrain.py": "from seer_scale.train.trainer import Trainer",
    "seer_scale/__init__.py": "def f(name):\n    from seer_scale.convert.loading import load",
    "seer_scale/train/__init__.py": "",
    "seer_scale/train/trainer.py": "import torch\nfrom seer_scale import checkpoint, config",
    "seer_scale/checkpoint.py": "from seer_scale import distributed",
    "seer_scale/config/__init__.py": "",
    "seer_scale/config/recipe.py": "import seer_scale.errors",
    "seer_scale/errors.py": "import os",
    "seer_scale/convert/__init__.py": "",
    "seer_scale/convert/loading.py": "def f():\n    import seer_scale.tracking.mlflow_client",
    "seer_scale/tracking/__init__.py": "",
    "seer_scale/tracking/mlflow_client.py": "import mlflow\nfrom mlflow.entities import Run",
    "seer_scale/parallel/__init__.py": "",
    "seer_scale/distributed/__init__.py": "",
    "seer_scale/distributed/collectives.py": "import torch.distributed as dist",
    "seer_scale/parallel/zero.py": "def f():\n    import deepspeed",
    "seer_scale/models/__init__.py": "from seer_scale.models.heads import Head",
    "seer_scale/models/heads.py": "import math\nfrom torch import nn\nimport torchvision",
    "seer_scale/objectives/__init__.py": "",
    "seer_scale/objectives/swav.py": "from seer_scale import distributed",
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_a_good_tree_passes(tmp_path: Path) -> None:
    write_tree(tmp_path, GOOD)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "seer_scale/checkpoint.py",
            "def f():\n    from seer_scale.train import trainer",
            "seer_scale.checkpoint (layer 5) imports seer_scale.train.trainer (layer 7)",
        ),
        (
            "seer_scale/config/recipe.py",
            "from .. import checkpoint",
            "seer_scale.config.recipe (layer 2) imports seer_scale.checkpoint (layer 5)",
        ),
        (
            "seer_scale/distributed/collectives.py",
            "from ..checkpoint import save",
            "seer_scale.distributed.collectives (layer 2) imports seer_scale.checkpoint (layer 5)",
        ),
        (
            "seer_scale/train/trainer.py",
            "import launch.pretrain",
            "seer_scale.train.trainer (layer 7) imports launch.pretrain (layer 10)",
        ),
        (
            "seer_scale/checkpoint.py",
            "import importlib\nimportlib.import_module('seer_scale.train.trainer')",
            "seer_scale.checkpoint (layer 5) imports seer_scale.train.trainer (layer 7)",
        ),
        ("seer_scale/helpers.py", "", "seer_scale.helpers is in no layer: add it to LAYERS"),
        (
            "seer_scale/train/trainer.py",
            "def f():\n    from deepspeed.utils import logger",
            "seer_scale.train.trainer imports deepspeed, which only seer_scale.parallel.zero may",
        ),
        (
            "launch/demo.py",
            "import mlflow.pyfunc",
            "launch.demo imports mlflow, which only seer_scale.tracking.mlflow_client may",
        ),
        (
            "seer_scale/models/heads.py",
            "import torch.distributed as dist",
            "seer_scale.models.heads imports torch.distributed",
        ),
        (
            "seer_scale/models/heads.py",
            "from torch import distributed",
            "seer_scale.models.heads imports torch.distributed",
        ),
        (
            "seer_scale/models/heads.py",
            "import torch\nx = torch.distributed.get_rank()",
            "seer_scale.models.heads imports torch.distributed",
        ),
        (
            "seer_scale/models/heads.py",
            "import numpy",
            "seer_scale.models.heads imports numpy",
        ),
        (
            "seer_scale/objectives/swav.py",
            "from seer_scale.models import Head",
            "seer_scale.objectives.swav imports seer_scale.models",
        ),
        (
            "seer_scale/parallel/zero.py",
            "def f():\n    from seer_scale.config import RunConfig",
            "seer_scale.parallel.zero imports the configuration of a run: pass values instead",
        ),
        (
            "seer_scale/parallel/zero.py",
            "from seer_scale.config.run_config import OptimSection",
            "seer_scale.parallel.zero imports the configuration of a run: pass values instead",
        ),
        (
            "seer_scale/parallel/zero.py",
            "from seer_scale import config\ndef f(x: config.RunConfig): ...",
            "seer_scale.parallel.zero imports the configuration of a run: pass values instead",
        ),
        (
            "seer_scale/errors.py",
            "from seer_scale.config.recipe import parse",
            "modules import each other: ",
        ),
    ],
)
def test_each_violation_is_found(tmp_path: Path, file: str, text: str, expected: str) -> None:
    write_tree(tmp_path, GOOD | {file: text})
    assert any(found.startswith(expected) for found in violations(tmp_path)), violations(tmp_path)


def loaded_by(modules: list[str], suspects: list[str]) -> list[str]:
    """Which of `suspects` are loaded once `modules` have been imported."""
    code = (
        "import sys, importlib\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {suspects!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return list(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_what_reads_the_configuration_loads_no_torch() -> None:
    assert loaded_by(["wave"], ["wave", "torch"]) == ["wave"]
    assert loaded_by(TORCH_FREE, ["torch", "mlflow", "deepspeed", "matplotlib"]) == []


def test_deepspeed_and_mlflow_are_loaded_only_when_used() -> None:
    modules = ["seer_scale.train.trainer", "seer_scale.parallel.zero", "seer_scale.convert.loading"]
    assert loaded_by(modules, ["deepspeed", "mlflow", "matplotlib"]) == []


def test_a_test_file_has_the_name_of_its_module_or_says_its_behaviour() -> None:
    homes = {
        ROOT / "tests": ROOT / "seer_scale",
        ROOT / "benchmarks" / "tests": ROOT / "benchmarks",
    }
    nameless = [
        path
        for tests, package in homes.items()
        for path in tests.rglob("test_*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
        and not (
            package / path.relative_to(tests).with_name(f"{path.stem.removeprefix('test_')}.py")
        ).exists()
    ]
    assert nameless == []


@pytest.mark.parametrize(("folder", "other"), [("tests", "benchmarks"), ("benchmarks", "tests")])
def test_tests_and_benchmarks_import_nothing_from_each_other(folder: str, other: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] == other], path
