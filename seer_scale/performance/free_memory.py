"""Memory that is free on this machine, or in the container of this process."""

from __future__ import annotations

from pathlib import Path

import psutil

# Limit, use and statistics of a control group, and the statistics that are no lasting use: pages of
# files, which the system gives up when memory is asked for. Version 2, version 1.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


def free_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Finds the memory in bytes that programs can still get.

    Args:
        cgroups: where the system shows the limits of this process's container.
    """
    left = int(psutil.virtual_memory().available)
    for limit, used, statistics, files in _CGROUPS:
        try:
            room = int((cgroups / limit).read_text()) - int((cgroups / used).read_text())
            rows = (line.split() for line in (cgroups / statistics).read_text().splitlines())
            left = min(left, room + sum(int(row[1]) for row in rows if row[0] in files))
        except (OSError, ValueError, IndexError):  # no such file, or "max"
            continue
    return left
