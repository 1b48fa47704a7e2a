"""A checkpoint's folder: made where there is room, named at once, set aside or deleted whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from seer_scale.checkpoint.manifest import one_line
from seer_scale.storage.tensor_file import sync

SPARE_BYTES = 64 << 20  # that a checkpoint leaves free on the disk


def make_room(partial: Path, needed: int) -> str | None:
    """Makes the folder of a save; what is in the way, if something is."""
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
    """Gives a checkpoint that is whole its name, in one step and on the disk."""
    sync(partial)
    if folder.exists():
        set_aside(folder)
    partial.rename(folder)
    sync(folder.parent)


def set_aside(folder: Path) -> None:
    """Renames a checkpoint that a resumed run overtakes: out of the way, not lost."""
    aside = folder.with_name(f"superseded_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def delete(folder: Path) -> None:
    """Deletes a checkpoint; a kill in mid-deletion does not leave half of one by its name."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.deleting")))
