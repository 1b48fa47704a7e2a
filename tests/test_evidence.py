"""Pages that name tests as their evidence: each row has some, and every test named exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from harness.jobs import ROOT

REFERENCE = re.compile(r"`(?P<path>(?:benchmarks/)?tests/[\w/]+\.py)::(?P<test>\w+)`")
LINK = re.compile(r"\[`(?P<test>test_\w+)`\]\(\.\./(?P<path>(?:benchmarks/)?tests/[\w/]+\.py)\)")
TICK = "✓"


def rows(path: Path, heading: str) -> list[list[str]]:
    """Cells of the rows of every table one of whose columns is `heading`, the heading's first."""
    found: list[list[str]] = []
    column: int | None = None
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            column = None
        elif heading in cells:
            column, width = cells.index(heading), len(cells)
        elif column is not None and not line.startswith("|---"):
            assert len(cells) == width, line
            found.append([cells[column], *cells[:column], *cells[column + 1 :]])
    return found


@cache
def defined(path: str) -> set[str]:
    """Names of the tests in a file."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def named(text: str, form: re.Pattern[str]) -> list[str]:
    """Tests that a text names, in the form of its page; each of them exists."""
    found = list(form.finditer(text))
    for match in found:
        assert match["test"] in defined(match["path"]), match[0]
    assert len(found) == len(re.findall(r"\btest_\w+`", text)), f"not in the page's form: {text}"
    return [match["test"] for match in found]


@pytest.mark.parametrize("name", ["faults.md", "abuse.md"])
def test_every_row_has_its_test(name: str) -> None:
    found = rows(ROOT / "docs" / name, "test")
    assert len(found) >= 25
    assert len({row[1] for row in found}) == len(found)
    for cell, *_ in found:
        assert named(cell, REFERENCE), cell


def test_a_tick_of_the_feature_table_has_its_test() -> None:
    page = ROOT / "docs" / "feature-table.md"
    assert named(page.read_text(), LINK)
    found = rows(page, "Seer Scale")
    assert len({row[1] for row in found}) == len(found) > 40
    for ours, feature, *others in found:
        assert all(others), feature
        assert ours.startswith((TICK, "no", "not shown: ")), ours
        assert ours.startswith(TICK) == bool(named(ours, LINK)), ours


def test_a_published_choice_has_its_test_or_says_why_there_is_none() -> None:
    page = ROOT / "docs" / "paper.md"
    assert named(page.read_text(), LINK)
    found = rows(page, "test")
    assert len(found) > 50
    for cell, choice, *others in found:
        assert all(others), choice
        assert cell.startswith("none: ") != bool(named(cell, LINK)), cell
