"""The machine around the GPUs: memory, shared memory and open files."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import psutil

from seer_scale.doctor.finding import GIB, Finding, below

SHM = Path("/dev/shm")
_CGROUP_LIMITS = (  # version 2, version 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def check_host() -> list[Finding]:
    """Memory, shared memory and the limit of open files."""
    return [_memory(), _shared_memory(), _open_files()]


def free_memory() -> int:
    """Bytes that this machine, or the container that this process is in, has left."""
    left = int(psutil.virtual_memory().available)
    for limit, used in _CGROUP_LIMITS:
        try:
            left = min(left, int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return left


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
        return Finding("shared memory", "warn", f"no {SHM}", "the loader may not work without it")
    room = os.statvfs(SHM)
    size = room.f_blocks * room.f_frsize / GIB
    status = below(size, fail=0.1, warn=1)
    return Finding(
        "shared memory",
        status,
        f"{size:.2f} GiB in {SHM}",
        "loaders hand over batches through it, and NCCL its buffers",
        ""
        if status == "ok"
        else "docker run --ipc=host or --shm-size=16g; an emptyDir on Kubernetes",
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
