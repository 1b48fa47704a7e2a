"""docs/faults.md and docs/abuse.md: at least 25 rows each, every one with a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.jobs import ROOT

REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows(path: Path, column: str) -> list[str]:
    """The rows of the table whose last column is `column`."""
    found: list[str] = []
    inside = False
    for line in path.read_text().splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.rstrip("| ").endswith(f"| {column}"):
            inside = True
        elif inside and not line.startswith("|---"):
            found.append(line)
    return found


@pytest.mark.parametrize("name", ["faults.md", "abuse.md"])
def test_every_row_has_its_test(name: str) -> None:
    found = rows(ROOT / "docs" / name, "test")
    assert len(found) >= 25
    assert len({row.split("|")[1] for row in found}) == len(found)
    for row in found:
        references = REFERENCE.findall(row)
        assert references, row
        for path, test in references:
            tree = ast.parse((ROOT / path).read_text())
            tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in tests, row
