"""Who may import whom: the floors of the house, and every import read off the source text."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

# Floors from the top; a module imports from its own folder and from lower floors, and the folders
# of one floor do not import each other. The longest entry that a module's name starts with counts.
FLOORS = [
    {"launch"},
    {"seer_scale.__main__"},
    {"seer_scale.commands"},
    {"seer_scale.train", "seer_scale.studies"},
    {"seer_scale.evaluation", "seer_scale.planner", "seer_scale.doctor"},
    {"seer_scale.checkpoint", "seer_scale.convert"},
    {"seer_scale.serving", "seer_scale.parallel"},
    {"seer_scale.optim", "seer_scale.objectives", "seer_scale.performance"},
    {
        "seer_scale.data",
        "seer_scale.distributed",
        "seer_scale.tracking",
        "seer_scale.models",
        "seer_scale.config",
    },
    {"seer_scale.storage"},
    {"seer_scale.errors", "seer_scale.preprocessing"},
]
LAYERS = {name: len(FLOORS) - 1 - i for i, floor in enumerate(FLOORS) for name in floor}
FACADE = "seer_scale"  # offers `load` of a higher layer, lazily
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
# The modules and folders that may import RunConfig or one of its sections; all others take values.
KNOWS_CONFIGURATION = {
    "seer_scale.config",
    "seer_scale.commands",
    "seer_scale.train.build",
    "seer_scale.train.build_afterword",
    "seer_scale.train.build_checks",
    "seer_scale.train.build_engine",
    "seer_scale.train.build_findings",
    "seer_scale.train.build_images",
    "seer_scale.train.build_model",
    "seer_scale.train.build_reports",
    "seer_scale.planner.plan",
}
# Modules that still have to be cleared; nothing may be added.
STILL_KNOWS_CONFIGURATION = {
    "seer_scale.performance.shape",
    "seer_scale.planner.advice",
    "seer_scale.planner.communication",
    "seer_scale.planner.memory",
    "seer_scale.planner.planned",
    "seer_scale.planner.step_time",
    "seer_scale.studies.study",
}


def within(name: str, package: str) -> bool:
    """Whether a dotted name is a package or lies inside the package."""
    return name == package or name.startswith(f"{package}.")


def room_of(module: str) -> str | None:
    """The folder that a module belongs to, or the module itself if it stands in the root."""
    return max((entry for entry in LAYERS if within(module, entry)), key=len, default=None)


def layer_of(module: str) -> int | None:
    """The floor of a module, counted from the bottom; None if the module is in no floor."""
    room = room_of(module)
    return None if room is None else LAYERS[room]


def find_modules(root: Path) -> dict[str, Path]:
    """Every module of the package and of launch/ below `root`, by dotted name."""
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


def knows_configuration(tree: ast.AST) -> bool:
    """Whether a module imports RunConfig or one of its sections, even for annotations only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seer_scale.config"):
            names = {alias.name for alias in node.names}
            if any(name == "RunConfig" or name.endswith("Section") for name in names):
                return True
        elif isinstance(node, ast.Attribute) and node.attr == "RunConfig":
            return True
    return False


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
        tree = ast.parse(path.read_text())
        names = set(imports(tree, module, modules))
        may_know = KNOWS_CONFIGURATION | STILL_KNOWS_CONFIGURATION
        if knows_configuration(tree) and not any(within(module, known) for known in may_know):
            found.append(f"{module} imports the configuration of a run: pass values instead")
        ours = {name for name in names if within(name, "seer_scale") or within(name, "launch")}
        for name in sorted(ours - {FACADE}):
            target = layer_of(name)
            aside = target == layer and room_of(name) != room_of(module)
            if target is not None and (target > layer or aside):
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
