"""Writes files and folders so that a reader, or a killed writer, never leaves half of one.

Everything is written beside its place, put on the disk, and moved into place by a rename.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(path: Path, *, writers: int = 1) -> Iterator[Path]:
    """Yields a path beside `path` to write to; at the end the new file takes the place of `path`.

    The folder of `path` is made if it is missing. The new file is deleted if the block raises.

    Args:
        path: the file to replace or to make.
        writers: processes or threads that may write `path` at the same time. One writer uses the
            same name beside `path` every time, so that a killed writer's file does not stay;
            whoever says so owns the path (see `storage.ownership`). Others use names of their own:
            process ids repeat in containers and on other machines.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = "" if writers == 1 else f".{secrets.token_hex(4)}"
    fresh = path.with_name(f"{path.name}{own}.writing")
    try:
        yield fresh
        sync(fresh)
        os.replace(fresh, path)
        sync(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def filled_folder(
    path: Path, *, last: str = "", without: Collection[str] = (), beside: Path | None = None
) -> Iterator[Path]:
    """Yields a new folder; at the end its files take their places in `path`.

    Other files in `path` stay. A killed writer leaves the old files, too few files or the new ones,
    and never some of both. The new folder is deleted if the block raises.

    Args:
        path: the folder that the files go to.
        last: name of the file that comes last and goes first: without it the folder is nothing.
        without: names of old files that go too, although no new file takes their place.
        beside: the path beside which the new folder is made; `path` unless given.

    Raises:
        OSError: if the folder cannot be written.
    """
    with _scratch_folder(beside or path) as fresh:
        yield fresh
        path.mkdir(parents=True, exist_ok=True)
        files = sorted(fresh.iterdir(), key=lambda file: (file.name == last, file.name))
        for file in files:
            sync(file)
        for name in (*(file.name for file in reversed(files)), *without):
            (path / name).unlink(missing_ok=True)
        for file in files:
            os.replace(file, path / file.name)
        sync(path)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path`; at the end the new folder takes the place of `path`.

    An older folder stands until the new one is whole. The new folder is deleted if the block
    raises.

    Raises:
        OSError: if the folder cannot be written.
    """
    with _scratch_folder(path) as fresh:
        yield fresh
        for written in (*fresh.rglob("*"), fresh):
            sync(written)
        if path.exists():
            old = path.with_name(f"{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
            os.replace(fresh, path)
            shutil.rmtree(old)
        else:
            os.replace(fresh, path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Puts a file, or a folder's list of names, on the disk.

    Raises:
        OSError: if the disk does not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)  # of a killed writer
    fresh.mkdir()
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
