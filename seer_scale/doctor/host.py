"""Checks of the host: memory, shared memory, open files, and the processor's products."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from seer_scale.doctor.finding import GIB, Finding, below
from seer_scale.performance.free_memory import free_memory
from seer_scale.performance.processor import multiplies_bfloat16

SHM = Path("/dev/shm")
MORE_SHM = "docker run --ipc=host or --shm-size=16g; an emptyDir on Kubernetes"


def check_host() -> list[Finding]:
    """Checks memory, shared memory, the limit of open files and bfloat16 on the processor."""
    return [_memory(), _shared_memory(), _open_files(), _bfloat16()]


def _memory() -> Finding:
    left = free_memory() / GIB
    status = below(left, fail=1, warn=4)
    return Finding(
        "memory",
        status,
        f"{left:.1f} GiB free",
        "a rank keeps batches and a host copy of its share of the state, 8 bytes a parameter",
        "" if status == "ok" else "end other programs, or give the container more",
    )


def _shared_memory() -> Finding:
    if not SHM.is_dir():
        return Finding(
            "shared memory",
            "warn",
            f"no {SHM}",
            "NCCL, and Python's locks between processes, may not work without it",
            "mount a tmpfs there",
        )
    room = os.statvfs(SHM)
    size = room.f_blocks * room.f_frsize / GIB
    status = below(size, fail=0, warn=1)
    return Finding(
        "shared memory",
        status,
        f"{size:.2f} GiB in {SHM}",
        "NCCL may keep its buffers there, tens of MB for each pair of GPUs; the loader needs none",
        "" if status == "ok" else MORE_SHM,
    )


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    status = "ok" if unlimited else below(soft, fail=256, warn=4096)
    return Finding(
        "open files",
        status,
        "unlimited" if unlimited else f"{soft} at most",
        "a rank opens a file per shard, and connections to all the others",
        "" if status == "ok" else f"ulimit -n {hard if 0 < hard < 65536 else 65536} before the run",
    )


def _bfloat16() -> Finding:
    there = multiplies_bfloat16()
    return Finding(
        "bfloat16",
        "ok",
        "the processor multiplies it" if there else "no instructions of the processor",
        "without a GPU, train.precision=bf16 is faster than fp32, most of all with wide trunks"
        if there
        else "without a GPU, a product in train.precision=bf16 is one in fp32 between conversions",
    )
