"""Files written past the page cache are the bytes that were given, wherever they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from seer_scale.storage.disk import BLOCK, BUFFER, DiskWriter

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


def test_a_file_is_written_from_one_buffer_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, lengths = os.write, []

    def watching(descriptor: int, data: memoryview) -> int:
        lengths.append(len(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", watching)
    data = np.frombuffer(os.urandom(2 * BUFFER + BLOCK + 1), dtype=np.uint8)
    with DiskWriter(tmp_path / "file") as file:
        done = 0
        while done < len(data):
            room = file.room()[: min(1_000_003, len(data) - done)]
            assert len(room)
            room[:] = data[done : done + len(room)]
            file.advance(len(room))
            done += len(room)
        file.finish()
    assert lengths == [BUFFER, BUFFER, BLOCK, 1]
    assert (tmp_path / "file").read_bytes() == data.tobytes()


def test_a_file_system_that_refuses_blocks_gets_the_file_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    refused: list[int] = []

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
