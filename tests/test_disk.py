"""Files written past the page cache are the bytes that were given, wherever they are written."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from seer_scale.disk import BLOCK, BUFFER, DiskWriter

LENGTHS = [0, 1, 4095, 4096, 4097, BUFFER - 1, BUFFER, BUFFER + 4097, 2 * BUFFER + 3]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("folder", ["disk", "memory"])
def test_what_is_written_is_read(length: int, folder: str, tmp_path: Path) -> None:
    path = tmp_path / "file" if folder == "disk" else Path("/dev/shm") / f"seer_{os.getpid()}"
    data = os.urandom(length)
    path.write_bytes(b"x" * (length + 10))  # what was there is replaced
    try:
        with DiskWriter(path) as file:
            for start in range(0, length, 1_000_003):  # in pieces that fit nothing
                file.write(memoryview(data)[start : start + 1_000_003])
            file.finish()
        assert path.read_bytes() == data
    finally:
        path.unlink()


def in_step(data: bytes, position: int) -> memoryview:
    """The same bytes at an address that is their position in the file, modulo a block."""
    memory = np.frombuffer(mmap.mmap(-1, len(data) + 2 * BLOCK), dtype=np.uint8)
    start = position % BLOCK
    memory[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
    return memory[start : start + len(data)].data


@pytest.mark.parametrize("position", [0, 1, 4095, 4096, 70_000, BUFFER - 1])
@pytest.mark.parametrize("length", [1, 4096, 65_535, 65_536, 200_001, BUFFER + 5])
def test_bytes_in_step_are_written_from_where_they_are(
    position: int, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, lengths = os.write, []

    def watching(descriptor: int, data: memoryview) -> int:
        lengths.append(len(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", watching)
    before, data, after = os.urandom(position), os.urandom(length), os.urandom(5000)
    with DiskWriter(tmp_path / "file") as file:
        direct = file._direct
        file.write(before)
        file.write(in_step(data, position))
        file.write(after)
        file.finish()
    assert (tmp_path / "file").read_bytes() == before + data + after
    if direct and length >= 2 * 65_536:
        # all of its whole blocks at once
        head = -position % BLOCK  # completes the block that it begins in
        assert (length - head) // BLOCK * BLOCK in lengths


def test_a_file_system_that_refuses_blocks_gets_the_file_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, refused = os.write, []

    def refusing(descriptor: int, data: memoryview) -> int:
        if not refused:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "no")
        return write(descriptor, data[:5000])  # and takes less than it is given

    monkeypatch.setattr(os, "write", refusing)
    data = os.urandom(BUFFER + 10_000)
    with DiskWriter(tmp_path / "file") as file:
        file.write(data)
        file.finish()
    assert refused
    assert (tmp_path / "file").read_bytes() == data


def test_a_full_disk_is_an_error() -> None:
    with DiskWriter(Path("/dev/full")) as file, pytest.raises(OSError, match="space"):
        file.write(b"x" * BUFFER)
