"""What a power cut would lose: follows fsync and rename, and compares files with what was synced.

A file is safe with the bytes that it had at its last fsync, and a folder with the names that it had
at its own. A rename must find everything below its source safe, and its target's folder must be
synced afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Key = tuple[int, int]  # device and inode: a file keeps them when it is renamed


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yields a list that holds, once the block has ended, a line for every possible loss."""
    safe: dict[Key, object] = {}
    renamed: dict[Path, Key] = {}  # by the new name
    lost: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        safe[key_of(path)] = content_of(path)

    def check(source: str | Path, target: str | Path) -> None:
        top = Path(source)
        lost.extend(
            f"{top.name} is renamed before {path.name} is on the disk"
            for path in (top, *sorted(top.rglob("*")))
            if safe.get(key_of(path)) != content_of(path)
        )
        renamed[Path(target)] = key_of(top)

    def note_rename(source: str | Path, target: str | Path) -> None:
        check(source, target)
        rename(source, target)

    def note_replace(source: str | Path, target: str | Path) -> None:
        check(source, target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note_fsync)
        patch.setattr(os, "rename", note_rename)
        patch.setattr(os, "replace", note_replace)
        yield lost
    assert renamed
    for target, key in renamed.items():
        if not target.exists():
            continue  # renamed once more, or deleted
        names = safe.get(key_of(target.parent))
        if not isinstance(names, dict) or names.get(target.name) != key:
            lost.append(f"the name {target.name} is not on the disk")


def key_of(path: Path) -> Key:
    status = path.stat()
    return status.st_dev, status.st_ino


def content_of(path: Path) -> object:
    """Bytes of a file; names of a folder, each with the file that it stands for."""
    if path.is_dir():
        return {entry.name: key_of(entry) for entry in path.iterdir()}
    return path.read_bytes()
