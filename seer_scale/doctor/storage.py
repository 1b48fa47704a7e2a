"""Measures how fast the runs' folder writes and reads a file, past the page cache."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from seer_scale.doctor.finding import GIB, Finding, below
from seer_scale.storage.disk import BUFFER, DiskWriter
from seer_scale.storage.disk_refusal import existing_part

BYTES = 256 << 20
# Weights and momentum in float32, and the trunk once more, for a billion parameters: GB.
_SAVE_GB = 12


def check_storage(folder: Path, size: int = BYTES) -> list[Finding]:
    """Writes and reads one file of `size` bytes in `folder`, then deletes the file."""
    existing = existing_part(folder)
    try:
        room = shutil.disk_usage(existing).free
        if room < 2 * size:
            return [
                Finding(
                    "disk",
                    "fail",
                    f"{room / GIB:.2f} GiB free for {folder}",
                    "not even a small checkpoint fits",
                    "make room, or set run.dir to another disk",
                )
            ]
        with tempfile.TemporaryDirectory(dir=existing, prefix=".seer-scale-") as scratch:
            write, read = _speeds(Path(scratch) / "probe", size)
    except OSError as error:
        return [
            Finding(
                "disk",
                "fail",
                f"{existing}: {error.strerror or error}",
                "runs could not be kept there",
                "set run.dir to a folder that you may write to",
            )
        ]
    status = below(write, fail=0, warn=0.25)
    seconds = _SAVE_GB / write
    return [
        Finding(
            "disk",
            status,
            f"{existing}: {write:.2f} GB/s written, {read:.2f} read; {room / GIB:.0f} GiB free",
            f"a rank saves a billion parameters in {seconds:.0f} s, beside the training: "
            + ("not the bottleneck" if status == "ok" else "frequent saves will be the bottleneck"),
            "" if status == "ok" else "save rarely (checkpoint.every), or put run.dir elsewhere",
        )
    ]


def _speeds(path: Path, size: int) -> tuple[float, float]:
    """Returns GB/s of writing, fsync included, and of reading."""
    block = np.random.default_rng(0).bytes(BUFFER)  # a disk may compress
    began = time.perf_counter()
    with DiskWriter(path) as file:
        for _ in range(size // BUFFER):
            file.write(block)
        file.finish()
    written = time.perf_counter()
    with path.open("rb", buffering=0) as reader:
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while reader.read(BUFFER):
            pass
    done = time.perf_counter()
    return size / 1e9 / (written - began), size / 1e9 / (done - written)
