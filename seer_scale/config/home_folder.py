"""`~` at the beginning of a path, which a shell leaves as it is in `key=~/x` and in files."""

from __future__ import annotations

import os
from pathlib import Path


def expand_home(text: str) -> str:
    """Returns a path, or several with commas between them, with the home folder for each `~`.

    Addresses, names and other values stay as they are.
    """
    return ",".join(map(os.path.expanduser, text.split(",")))


def local_path(text: str) -> Path:
    """Returns a path with the home folder for `~`: a `type=` for an argument."""
    return Path(text).expanduser() if text.startswith("~") else Path(text)
