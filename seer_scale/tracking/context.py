"""Who started a program, from what, and at which commit: the tags that MLflow shows with a run."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from pathlib import Path

import seer_scale

_GIT_SECONDS = 5.0


def context() -> dict[str, str]:
    """Tags of a run that this process starts, under MLflow's own names.

    The commit is that of the clone which this package belongs to; an installed package has none.
    """
    folder = Path(seer_scale.__file__).resolve().parent
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": sys.argv[0] or "python",
        "mlflow.source.type": "LOCAL",
    }
    # Installed into an environment below another project's clone, it is not part of that project.
    if not _git(folder, "ls-files", "__init__.py"):
        return tags
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    found = {
        "mlflow.source.git.commit": _git(folder, "rev-parse", "HEAD"),
        "mlflow.source.git.branch": _git(folder, "branch", "--show-current"),
        "mlflow.source.git.repoURL": _git(folder, "remote", "get-url", "origin"),
        "mlflow.source.git.dirty": None if changed is None else str(bool(changed)),
    }
    return {**tags, **{key: value for key, value in found.items() if value}}


def _user() -> str:
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):  # a container's number of a user without a name
        return "unknown"


def _git(folder: Path, *words: str) -> str | None:
    """Answer of a git command; None without git or a clone, or if git does not answer."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
