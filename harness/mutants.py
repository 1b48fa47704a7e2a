"""Planted mistakes: the patches in tests/mutants/, and the tests that import what they change."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from harness.jobs import ROOT

PACKAGE = "seer_scale"
OUTSIDE = "root"  # the package's name for the modules that lie in no folder
PATCHES = ROOT / "tests" / "mutants"
GOLDEN = "tests/launch/test_golden_runs.py"  # short runs of the real command; asked last


@dataclass(frozen=True)
class Patch:
    """One small mistake.

    Attributes:
        package: folder of seer_scale/, or `root`; also the name of the patch's TOML file.
        name: unique in its package, of lower-case words joined by dashes.
        file: the changed file, from the repository's root.
        old: text that stands exactly once in the file.
        new: what the mistake writes in its place.
        why: what would go wrong, in one line.
        tests: tests that are known to fail, as pytest names them; they are asked first.
        argued: why no test can or should tell the patch from the original; None if one should.
    """

    package: str
    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...] = ()
    argued: str | None = None

    @property
    def id(self) -> str:
        """`package/name`."""
        return f"{self.package}/{self.name}"

    def apply(self, root: Path) -> str:
        """Text of the file below `root` with the mistake in it.

        Raises:
            ValueError: if `old` does not stand exactly once in the file.
        """
        text = (root / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"{self.id}: its `old` stands {count} times in {self.file} and must stand there "
                "once: correct the patch"
            )
        return text.replace(self.old, self.new)


def read_patches(folder: Path = PATCHES) -> list[Patch]:
    """Reads every patch, in the order of the packages' names."""
    return [
        Patch(package=path.stem, **{**entry, "tests": tuple(entry.get("tests", ()))})
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text())["patch"]
    ]


def package_of(file: str) -> str:
    """The package that a file of seer_scale/ belongs to: its first folder, or `root`."""
    parts = Path(file).parts
    return parts[1] if len(parts) > 2 else OUTSIDE


def files_testing(file: str) -> list[str]:
    """Test files that may notice a change of `file`, those nearest to it first.

    Nearest are test files of the module's own name; then those that import it, by themselves or by
    a helper beside them; then those that import a module of the same package that imports it. If
    there is none, all test files of the package's folder.
    """
    module, package = _dotted(file), package_of(file)
    imports = _imports()
    tests = [path for path in imports if _is_test(path)]
    stem = Path(file).stem
    own = [path for path in tests if Path(path).name == f"test_{stem}.py"]
    direct = [path for path in tests if module in _reached(path, imports)]
    near = {
        _dotted(path)
        for path, names in imports.items()
        if package_of(path) == package and path.startswith(PACKAGE) and module in names
    }
    folder = [path for path in tests if f"/{package}/" in path]
    chain = [path for path in folder if near & _reached(path, imports)]
    return list(dict.fromkeys([*own, *direct, *chain])) or folder


def _is_test(path: str) -> bool:
    return path.startswith("tests/") and Path(path).name.startswith("test_") and path != GOLDEN


def _dotted(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _reached(path: str, imports: dict[str, frozenset[str]]) -> set[str]:
    """Modules that a test file imports, and those of its helpers in tests/ and of its conftest."""
    found = set(imports[path])
    helpers = [f"{name.replace('.', '/')}.py" for name in found if name.startswith("tests.")]
    for helper in [*helpers, str(Path(path).with_name("conftest.py"))]:
        found |= imports.get(helper, frozenset())
    return found


@cache
def _imports() -> dict[str, frozenset[str]]:
    """Modules of the repository that each of its files imports, by the file's path."""
    files = [path for part in (PACKAGE, "tests") for path in sorted((ROOT / part).rglob("*.py"))]
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in files}
    modules = {_dotted(path) for path in trees}
    offers = {  # what an __init__.py imports can be imported from its folder
        (_dotted(path), alias.asname or alias.name): base
        for path, tree in trees.items()
        if path.endswith("__init__.py")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for base in [_base(node, path)]
        for alias in node.names
    }
    return {path: frozenset(_names(tree, path, modules, offers)) for path, tree in trees.items()}


def _base(node: ast.ImportFrom, path: str) -> str:
    if not node.level:
        return node.module or ""
    parents = Path(path).parts[:-1]
    kept = parents[: len(parents) - node.level + 1]
    return ".".join([*kept, *filter(None, [node.module])])


def _names(
    tree: ast.AST, path: str, modules: set[str], offers: dict[tuple[str, str], str]
) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, path)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in modules else offers.get((base, alias.name), base)
