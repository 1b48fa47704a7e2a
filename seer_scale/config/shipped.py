"""Locations of the files that come with the package: recipes, studies, DeepSpeed configurations.

The names are the same in a clone (beside the package) and in a wheel (inside it: setup.py).
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = _PACKAGE if (_PACKAGE / "ds_configs").is_dir() else _PACKAGE.parent
RECIPES = SHIPPED / "launch" / "recipes"


def find(path: Path | str) -> Path:
    """Returns `path` if it exists, else the shipped file of that name.

    So `ds_configs/zero2.json` means the same file in a clone and in any other folder.
    """
    shipped = SHIPPED / path
    return shipped if shipped.is_file() and not Path(path).exists() else Path(path)
