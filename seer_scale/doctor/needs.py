"""Compares what a run needs of this machine with what is here: memory, files, ports and disks."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from seer_scale.doctor.finding import GIB, Finding, Status
from seer_scale.doctor.host import MORE_SHM, SHM
from seer_scale.storage.disk_refusal import existing_part

# Open files of a process that has joined a process group and loads images from a folder.
FILES = 256
FILES_PER_RANK = 4  # connections to another rank, over all groups of ranks


def check_memory(name: str, parts: Sequence[tuple[str, float]], free: float, knobs: str) -> Finding:
    """Compares the memory that a run takes with the memory that is free.

    Args:
        name: name of the finding.
        parts: what the memory is for, and its bytes.
        free: bytes.
        knobs: what lowers the need, as advice.
    """
    needed = sum(size for _, size in parts)
    status: Status = "ok" if needed <= 0.9 * free else "warn" if needed <= free else "fail"
    meaning = {
        "ok": "it fits",
        "warn": "it fits barely: another program may end the run",
        "fail": "the run would end without memory",
    }[status]
    listed = ", ".join(f"{what} {size / GIB:.2f}" for what, size in parts)
    return Finding(
        name,
        status,
        f"needs {needed / GIB:.2f} GiB ({listed}), {free / GIB:.2f} free",
        meaning,
        "" if status == "ok" else knobs,
    )


def check_disk(name: str, folder: Path, needed: float, *, present: float, advice: str) -> Finding:
    """Compares the room that a run takes on a disk with the room that is free.

    Args:
        name: name of the finding.
        folder: where the run writes; it need not exist yet.
        needed: bytes in all.
        present: bytes of them that are there already.
        advice: what to do if they do not fit.
    """
    place = existing_part(folder)
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding(name, "fail", f"{place}: {error.strerror or error}", "not usable", advice)
    if not os.access(place, os.W_OK | os.X_OK):
        meaning = "the run could write nothing there"
        return Finding(name, "fail", f"{place} cannot be written", meaning, advice)
    fits = needed - present <= free
    return Finding(
        name,
        "ok" if fits else "fail",
        f"needs {needed / GIB:.2f} GiB, {present / GIB:.2f} there, {free / GIB:.2f} free: {folder}",
        "it fits" if fits else "the disk would be full during the run",
        "" if fits else advice,
    )


def check_open_files(ranks: int, micro_batches: int, shards: int) -> Finding:
    """Compares the open files of a rank with the limit of this process.

    Args:
        ranks: ranks of the whole run, which are connected.
        micro_batches: micro-batches in the loader's hands, a file each.
        shards: shards that a loader has open at the same time.
    """
    needed = FILES + FILES_PER_RANK * ranks + micro_batches + shards
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fits = soft == resource.RLIM_INFINITY or needed <= soft
    return Finding(
        "open files",
        "ok" if fits else "fail",
        f"needs about {needed} a rank, {soft} allowed",
        "enough" if fits else "connections or shards could not be opened",
        "" if fits else f"ulimit -n {hard if needed < hard else needed} before the run",
    )


def check_port(port: int, ranks: int) -> Finding:
    """Checks that the port at which the ranks meet is free.

    Args:
        port: MASTER_PORT of the run.
        ranks: ranks of the whole run; one alone needs no port.
    """
    if ranks == 1:
        return Finding("port", "ok", "none is needed", "one rank meets nobody")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the ranks' store does
        try:
            probe.bind(("", port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "in use, most likely by another run" if taken else str(error.strerror)
            return Finding(
                "port",
                "fail",
                f"{port} is {why}",
                "the ranks could not meet",
                "give this run a port of its own: deepspeed --master_port PORT, torchrun "
                "--master-port PORT",
            )
    return Finding("port", "ok", f"{port} is free", "the ranks can meet there")


def check_nccl_memory(ranks: int, *, cuda: bool, folder: Path = SHM) -> Finding:
    """Checks shared memory, which only NCCL among the GPUs of a machine needs.

    Args:
        ranks: ranks of this machine.
        cuda: whether they use GPUs.
        folder: where shared memory is mounted.
    """
    if not cuda or ranks == 1:
        return Finding("shared memory", "ok", "none is needed", "the loader does without")
    try:
        room = os.statvfs(folder)
        free = room.f_bavail * room.f_frsize / GIB
    except OSError:
        free = 0.0
    enough = free >= 1
    return Finding(
        "shared memory",
        "ok" if enough else "warn",
        f"{free:.2f} GiB free in {folder}",
        "NCCL keeps buffers there, tens of MB for each pair of GPUs",
        "" if enough else MORE_SHM,
    )
