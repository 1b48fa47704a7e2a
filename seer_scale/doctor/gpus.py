"""GPUs as the driver and as torch see them, and the optional parts that need them."""

from __future__ import annotations

import shutil
import subprocess

from seer_scale.doctor.finding import GIB, Finding

_QUERY = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")


def check_driver() -> list[Finding]:
    """Checks the driver by nvidia-smi, without torch."""
    rows = _driver_rows()
    if not rows:
        return [
            Finding(
                "driver",
                "warn",
                "no NVIDIA GPU",
                "everything trains on the CPU, which is meant for small models",
                "in a container: docker run --gpus all; else install NVIDIA's driver",
            )
        ]
    names = ", ".join(f"{name} {int(memory) / 1024:.0f} GiB" for name, memory, _ in rows)
    return [Finding("driver", "ok", f"{rows[0][2]}: {len(rows)} x [{names}]", "it answers")]


def check_gpus() -> list[Finding]:
    """Checks the GPUs as torch sees them: CUDA, NCCL, memory, peer access; imports torch."""
    import torch

    if not torch.cuda.is_available():
        if not _driver_rows():
            return []
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU torch"
        )
        return [
            Finding(
                "cuda",
                "fail",
                built,
                "the driver has GPUs that torch cannot use, so runs would be on the CPU",
                "update the driver, or install the torch that is built for its CUDA",
            )
        ]
    count = torch.cuda.device_count()
    found = [_library(count)]
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        idle = free > 0.9 * total
        room = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        found.append(
            Finding(
                f"gpu {index}",
                "ok" if idle else "warn",
                f"{torch.cuda.get_device_name(index)}, {room}",
                "free for a run" if idle else "somebody else is on it",
                "" if idle else "end the other program, or choose with CUDA_VISIBLE_DEVICES",
            )
        )
    if count > 1:
        found.append(_peers(count))
    return found


def _library(count: int) -> Finding:
    import torch
    import torch.distributed as dist

    built = f"CUDA {torch.version.cuda}"
    if not dist.is_nccl_available():
        return Finding(
            "cuda",
            "fail" if count > 1 else "warn",
            f"{built}, no NCCL",
            "torch uses the GPUs, but several ranks cannot communicate",
            "install torch's own wheel for Linux, or train with one rank",
        )
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return Finding("cuda", "ok", f"{built}, NCCL {nccl}", "torch uses the GPUs")


def _peers(count: int) -> Finding:
    import torch

    apart = [
        f"{a}-{b}"
        for a in range(count)
        for b in range(a + 1, count)
        if not torch.cuda.can_device_access_peer(a, b)
    ]
    return Finding(
        "peer access",
        "warn" if apart else "ok",
        f"not between {', '.join(apart)}" if apart else "between all GPUs",
        "gradients go through host memory there" if apart else "GPUs reach each other directly",
        "see `nvidia-smi topo -m`; virtual machines and ACS often forbid it" if apart else "",
    )


def _driver_rows() -> list[tuple[str, str, str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", *_QUERY], capture_output=True, text=True, timeout=4, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [(row[0], row[1], row[2]) for row in rows if len(row) == 3 and row[1].isdecimal()]
