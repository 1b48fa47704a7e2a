"""Processes that run a part of this package."""

from __future__ import annotations

import os
from pathlib import Path

import seer_scale


def package_environment() -> dict[str, str]:
    """Returns this process's environment, with the path of this package for a child.

    The package may be a clone that is not installed.
    """
    root = str(Path(seer_scale.__file__).resolve().parents[1])
    search = filter(None, [root, os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
