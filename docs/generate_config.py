"""Writes docs/config.md, every key of a run, from what checks them.

`python docs/generate_config.py`; tests/test_docs.py fails where the page is not what this makes.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from seer_scale.config import command_line, schema  # noqa: E402
from seer_scale.objectives.build import NOT_OPTIONS, OBJECTIVES  # noqa: E402

PAGE = ROOT / "docs" / "config.md"
HEAD = """\
# Every key

A recipe (`launch/recipes/*.yaml`: sections of keys) configures a run. `section.key=value` on the
command line overrides the recipe; values are YAML. `config.yaml` in a run's folder holds all keys
as they were, and `--recipe config.yaml` reads them back. Unknown keys and wrong types are refused:
mistakes are reported in one sentence before anything starts.

"from the recipe" means that there is no default: the recipe sets the key. `null` means not set.
"expert" marks keys that hardly anybody needs to change."""
TAIL = """\
`python docs/generate_config.py` writes this page from the sections in `seer_scale/config/`. Edit
those, not this page."""
# Annotations of an objective's arguments, as the keys of the configuration say it.
TAKES = {"float": "a number", "int": "an integer", "tuple[int, ...]": "a list of integers"}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section in schema.sections():
        keys = [key for key in schema.key_schemas() if key.startswith(f"{section}.")]
        parts += [f"## {section}", _table([_row(key) for key in keys])]
        if section == "objective":
            for name, constructor in OBJECTIVES.items():
                parts += [f"With `objective.name={name}`:", _table(_option_rows(constructor))]
            parts.append("Others have options of their own: [extending](extending.md).")
    return "\n\n".join([*parts, TAIL]) + "\n"


def _row(key: str) -> tuple[str, str, str, str]:
    described = schema.key_schemas()[key]
    return key, schema.allowed(described), command_line.default_of(key), described["description"]


def _option_rows(constructor: Any) -> list[tuple[str, str, str, str]]:
    """The keyword arguments of an objective, described by its docstring."""
    arguments = (inspect.getdoc(constructor) or "").partition("Args:\n")[2].partition("\n\n")[0]
    told = {
        name: " ".join(text.split()).rstrip(".")
        for name, text in re.findall(r"^    (\w+): (.+(?:\n {8,}.+)*)", arguments, re.MULTILINE)
    }
    return [
        (f"objective.{name}", TAKES[parameter.annotation], _yaml(parameter.default), told[name])
        for name, parameter in inspect.signature(constructor).parameters.items()
        if name not in NOT_OPTIONS
    ]


def _yaml(value: Any) -> str:
    return schema.shown(list(value) if isinstance(value, tuple) else value)


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | takes | default | what it is |", "|---|---|---|---|"]
    for key, takes, default, description in rows:
        shown = default if default == "from the recipe" else f"`{default}`"
        cells = (f"`{key}`", takes, shown, description)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if "`" in text else text.replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
