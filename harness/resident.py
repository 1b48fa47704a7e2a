"""Real memory of this process, by Linux's account."""

from __future__ import annotations

from pathlib import Path


def resident_bytes(key: str) -> int:
    """Bytes that this process has now (`VmRSS`), or has had at most (`VmHWM`).

    Raises:
        RuntimeError: on other systems.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status names no {key}: this needs Linux")
