"""Checks that the file system of the runs' folder has locks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from seer_scale.doctor.finding import Finding
from seer_scale.storage.disk_refusal import existing_part
from seer_scale.storage.locks import lock


def has_locks(folder: Path) -> bool:
    """Tells whether a file in `folder` can be locked, exclusively and shared.

    Raises:
        OSError: no file can be written there.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".seer-scale-") as file:
        return bool(lock(file.fileno())) and bool(lock(file.fileno(), shared=True))


def check_locks(folder: Path) -> Finding:
    """Checks the locks of the file system that `folder` lies on, or will lie on."""
    place = existing_part(folder)
    try:
        locks = has_locks(place)
    except OSError as error:
        return Finding(
            "locks",
            "fail",
            f"{place}: {error.strerror or error}",
            "runs could not be kept there",
            "set run.dir to a folder that you may write to",
        )
    if locks:
        return Finding("locks", "ok", f"{place} has them", "one process at a time writes a run")
    return Finding(
        "locks",
        "warn",
        f"{place} has none",
        "a run that is killed on another machine is noticed late, others as usual",
        "mount it with locks (Lustre: -o flock; NFS: without nolock), or keep run.dir elsewhere",
    )
