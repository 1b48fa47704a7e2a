"""Where the files are that come with the package: recipes, studies, DeepSpeed's configurations.

Under the same names in a clone, beside the package, and in a wheel, inside it (setup.py).
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = _PACKAGE if (_PACKAGE / "ds_configs").is_dir() else _PACKAGE.parent
RECIPES = SHIPPED / "launch" / "recipes"


def find(path: Path | str) -> Path:
    """`path` as it is, or what comes with the package under that name if there is nothing here.

    So `ds_configs/zero2.json` means the same in a clone and in any other folder.
    """
    shipped = SHIPPED / path
    return shipped if shipped.is_file() and not Path(path).exists() else Path(path)
