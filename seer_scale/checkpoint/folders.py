"""Folders of checkpoints: made where there is room, published by one rename, deleted whole."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from seer_scale.checkpoint.manifest import one_line
from seer_scale.storage.atomic import sync

SPARE_BYTES = 64 << 20  # that a checkpoint leaves free on the disk


def make_room(partial: Path, needed: int) -> str | None:
    """Makes the folder of a save; returns the problem in words, or None."""
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        return one_line(error)
    needed += SPARE_BYTES
    if free < needed:
        shutil.rmtree(partial, ignore_errors=True)
        return (
            f"it needs {needed / 2**30:.2f} GiB and {partial.parent} has {free / 2**30:.2f} GiB "
            "free: delete something, or lower checkpoint.keep"
        )
    return None


def publish(partial: Path, folder: Path) -> None:
    """Renames a whole checkpoint to its final name.

    Its manifest was written last, which has put every file and name of the folder on the disk.
    """
    if folder.exists():
        set_aside(folder)
    partial.rename(folder)
    sync(folder.parent)


def set_aside(folder: Path) -> None:
    """Renames a checkpoint that a resumed run overtakes; nothing is lost."""
    aside = folder.with_name(f"superseded_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def delete(folder: Path) -> None:
    """Deletes a checkpoint; a kill during the deletion leaves no half checkpoint under its name.

    A run and `seer-scale checkpoint prune` may delete the same one at the same time.
    """
    with suppress(FileNotFoundError):
        doomed = folder.rename(folder.with_name(f".{folder.name}.deleting"))
        while doomed.exists():
            with suppress(FileNotFoundError):
                shutil.rmtree(doomed)
