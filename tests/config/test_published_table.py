"""docs/paper.md's table of sources against the recipe files, value by value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OWN = {"debug", "demo"}  # recipes of this project, with nothing published
MACHINE = {"data.path", "data.augment_on", "data.workers"}  # keys that depend on the machine
CELL = re.compile(r"`([^`]+)` (\w+(?:, \w+)*)")


def section() -> str:
    page = (ROOT / "docs" / "paper.md").read_text()
    return page.partition("## Every number of every recipe\n")[2].partition("\n## ")[0]


def tables() -> list[list[list[str]]]:
    """The tables of the section: rows of cells, the headings first."""
    found: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\n)+", section(), re.MULTILINE):
        lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n")
        ]
        found.append([cells for cells in lines[:-1] if set(cells[0]) != {"-"}])
    return found


def recipes() -> dict[str, dict[str, Any]]:
    """Every key that a recipe file sets, by recipe."""
    read = {
        path.stem: yaml.safe_load(path.read_text())
        for path in (ROOT / "launch" / "recipes").glob("*.yaml")
        if path.stem not in OWN
    }
    return {
        name: {
            f"{section}.{key}": value
            for section, keys in sections.items()
            for key, value in keys.items()
            if f"{section}.{key}" not in MACHINE | {"objective.name"}
        }
        for name, sections in read.items()
    }


def test_the_table_has_every_number_of_every_recipe() -> None:
    legend, (headings, *rows) = tables()
    names = [heading.strip("`") for heading in headings[1:]]
    marks = {cells[0] for cells in legend[1:]}
    tabled: dict[str, dict[str, Any]] = {name: {} for name in names}
    used = set()
    for key, *cells in rows:
        for name, cell in zip(names, cells, strict=True):
            if cell == "-":
                continue
            found = CELL.fullmatch(cell)
            assert found, f"{key}, {name}: {cell}"
            tabled[name][key.strip("`")] = yaml.safe_load(found[1])
            used |= set(found[2].split(", "))
    assert tabled == recipes()
    assert used == marks


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_recipe_marks_what_was_inferred(name: str) -> None:
    """What the table calls inferred, or ours, is said in the recipe's own comments too."""
    _, (headings, *rows) = tables()
    column = [heading.strip("`") for heading in headings].index(name)
    inferred = {mark for row in rows for mark in ("16GF", "128GF", "256GF") if mark in row[column]}
    text = (ROOT / "launch" / "recipes" / f"{name}.yaml").read_text()
    assert bool(inferred) <= bool(re.search(r"inferred|Not published", text)), inferred
