"""The patches that `make mutants` plants: each still fits the code, and no package is without."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from harness.jobs import ROOT
from harness.mutants import OUTSIDE, PATCHES, Patch, files_testing, package_of, read_patches

ALL = read_patches()


@cache
def defined(path: str) -> set[str]:
    """Names of the tests in a file."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("package", sorted({patch.package for patch in ALL}))
def test_patches_fit_the_code_and_leave_it_readable(package: str) -> None:
    for patch in (patch for patch in ALL if patch.package == package):
        before, after = (ROOT / patch.file).read_text(), patch.apply(ROOT)
        assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before)), patch.id
        assert package_of(patch.file) == package, patch.id
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", patch.name), patch.id
        assert patch.why, patch.id
        assert "\n" not in patch.why, patch.id
        assert patch.argued is None or len(patch.argued.split()) > 5, patch.id
        for test in patch.tests:
            path, _, name = test.partition("::")
            assert not name or name.partition("[")[0] in defined(path), f"{patch.id}: {test}"


def test_there_are_enough_of_them_and_in_every_package() -> None:
    folders = {path.parent.name for path in ROOT.glob("seer_scale/*/__init__.py")}
    assert {patch.package for patch in ALL} == folders | {OUTSIDE}
    assert len({patch.id for patch in ALL}) == len(ALL) >= 120
    assert {path.suffix for path in PATCHES.iterdir()} == {".toml"}


def test_tests_of_a_file_are_those_that_import_it() -> None:
    assert files_testing("seer_scale/optim/schedules.py")[0] == "tests/optim/test_schedules.py"
    # By name, through the folder's __init__.py, and through a helper beside the tests.
    assert "tests/objectives/test_swav.py" in files_testing("seer_scale/objectives/swav.py")
    assert "tests/train/test_trainer.py" in files_testing("seer_scale/train/trainer.py")
    # Nobody imports these two: their own package's tests are asked.
    for file in ("seer_scale/commands/shapes.py", "seer_scale/parallel/fused_backward.py"):
        assert files_testing(file)
        assert all((ROOT / found).is_file() for found in files_testing(file))


def test_a_patch_that_does_not_fit_is_named(tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text("a = 1\nb = 1\n")
    twice = Patch("some", "twice", "some.py", "1", "2", "why")
    with pytest.raises(ValueError, match=r"some/twice: its `old` stands 2 times in some\.py"):
        twice.apply(tmp_path)
    assert Patch("some", "once", "some.py", "a = 1", "a = 2", "why").apply(tmp_path) == (
        "a = 2\nb = 1\n"
    )
