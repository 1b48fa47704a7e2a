"""Who may import whom: the layers of docs/design.md, read off the source text."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The longest entry that a module's name starts with counts.
LAYERS = {
    "launch": 4,
    "seer_scale.__main__": 4,
    "seer_scale.commands": 4,
    "seer_scale.doctor": 3,
    "seer_scale.train": 3,
    "seer_scale.planner": 3,
    "seer_scale.studies": 3,
    "seer_scale.parallel.compatibility": 3,
    "seer_scale.checkpoint": 2,
    "seer_scale.optim.slice_sgd": 2,
    "seer_scale.serving": 2,
    "seer_scale.data": 2,
    "seer_scale.convert": 2,
    "seer_scale.evaluation": 2,
    "seer_scale.tracking": 2,
    "seer_scale.performance": 2,
    "seer_scale.parallel.engine": 2,
    "seer_scale.parallel.torch_engine": 2,
    "seer_scale.parallel.fsdp": 2,
    "seer_scale.parallel.fused_backward": 2,
    "seer_scale.parallel.zero": 2,
    "seer_scale.parallel": 1,
    "seer_scale.models": 1,
    "seer_scale.optim": 1,
    "seer_scale.objectives": 1,
    "seer_scale.storage": 0,
    "seer_scale.distributed": 0,
    "seer_scale.errors": 0,
    "seer_scale.config": 0,
    "seer_scale.preprocessing": 0,
}
FACADE = "seer_scale"  # offers `load` of a higher layer, lazily
TORCH_FREE = [
    "seer_scale",
    "seer_scale.errors",
    "seer_scale.config",
    "seer_scale.config.recipe",
    "seer_scale.config.ds_config",
    "seer_scale.config.schema",
    "seer_scale.config.yaml_text",
    # --help answers at once
    *sorted(f"seer_scale.commands.{file.stem}" for file in ROOT.glob("seer_scale/commands/*.py")),
]
# What a part of the package may import besides itself and the standard library.
ONLY = {
    "seer_scale.models": {"torch", "torchvision", "seer_scale.errors"},
    "seer_scale.objectives": {
        "torch",
        "pydantic",
        "seer_scale.errors",
        "seer_scale.distributed",
    },
}
# The one module that may import it.
SOLE_IMPORTER = {
    "apex": "seer_scale.parallel.apex",
    "deepspeed": "seer_scale.parallel.zero",
    "fairscale": "seer_scale.parallel.fairscale",
    "mlflow": "seer_scale.tracking.mlflow_client",
}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_of(module: str) -> int | None:
    entries = [entry for entry in LAYERS if within(module, entry)]
    return LAYERS[max(entries, key=len)] if entries else None


def find_modules(root: Path) -> dict[str, Path]:
    modules = {}
    for path in sorted([*root.glob("seer_scale/**/*.py"), *root.glob("launch/**/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports(tree: ast.AST, module: str, modules: dict[str, Path]) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it, or reaches through `torch.`."""
    package = module if modules[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in modules or base == "torch" else base
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            yield from (str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant))


def violations(root: Path) -> list[str]:
    """One sentence for each rule that the modules below `root` break."""
    modules = find_modules(root)
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        if module == FACADE:
            continue
        layer = layer_of(module)
        if layer is None:
            found.append(f"{module} is in no layer: add it to LAYERS")
            continue
        names = set(imports(ast.parse(path.read_text()), module, modules))
        ours = {name for name in names if within(name, "seer_scale") or within(name, "launch")}
        for name in sorted(ours - {FACADE}):
            target = layer_of(name)
            if target is not None and target > layer:
                found.append(f"{module} (layer {layer}) imports {name} (layer {target})")
        if path.name != "__init__.py":
            graph[module] = {n for n in ours if n in modules and modules[n].name != "__init__.py"}
        for package, sole in SOLE_IMPORTER.items():
            if not within(module, sole) and any(within(name, package) for name in names):
                found.append(f"{module} imports {package}, which only {sole} may")
        for part, allowed in ONLY.items():
            if within(module, part):
                for name in sorted(names):
                    known = name.split(".")[0] in sys.stdlib_module_names
                    if not known and not any(within(name, a) for a in {*allowed, part}):
                        found.append(f"{module} imports {name}")
        reaches_out = any(within(name, "torch.distributed") for name in names)
        if reaches_out and within(module, "seer_scale.models"):
            found.append(f"{module} imports torch.distributed")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"modules import each other: {' -> '.join(error.args[1])}")
    return found


def test_imports_go_down() -> None:
    modules = find_modules(ROOT)
    assert {
        "seer_scale.train.trainer",
        "seer_scale.parallel.zero",
        "launch.pretrain",
    } <= modules.keys()
    assert violations(ROOT) == []


GOOD = {
    "launch/pretrain.py": "from seer_scale.train.trainer import Trainer",
    "seer_scale/__init__.py": "def f(name):\n    from seer_scale.convert.loading import load",
    "seer_scale/train/trainer.py": "import torch\nfrom seer_scale import checkpoint, config",
    "seer_scale/checkpoint.py": "from seer_scale import distributed",
    "seer_scale/config/__init__.py": "",
    "seer_scale/config/recipe.py": "import seer_scale.errors",
    "seer_scale/errors.py": "import os",
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
            "seer_scale.checkpoint (layer 2) imports seer_scale.train.trainer (layer 3)",
        ),
        (
            "seer_scale/config/recipe.py",
            "from .. import checkpoint",
            "seer_scale.config.recipe (layer 0) imports seer_scale.checkpoint (layer 2)",
        ),
        (
            "seer_scale/distributed/collectives.py",
            "from ..checkpoint import save",
            "seer_scale.distributed.collectives (layer 0) imports seer_scale.checkpoint (layer 2)",
        ),
        (
            "seer_scale/train/trainer.py",
            "import launch.pretrain",
            "seer_scale.train.trainer (layer 3) imports launch.pretrain (layer 4)",
        ),
        (
            "seer_scale/checkpoint.py",
            "import importlib\nimportlib.import_module('seer_scale.train.trainer')",
            "seer_scale.checkpoint (layer 2) imports seer_scale.train.trainer (layer 3)",
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
