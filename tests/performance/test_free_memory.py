"""Memory that is free: the machine's, or what a container's limit leaves of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from seer_scale.performance.free_memory import free_memory

MB = 1 << 20


def test_without_a_limit_it_is_the_machine_s(tmp_path: Path) -> None:
    machine = psutil.virtual_memory()
    assert 0 < free_memory(tmp_path) <= machine.total
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert 1000 * MB < free_memory(tmp_path) + 1000 * MB <= machine.total + 1000 * MB


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_page_cache_is_free(tmp_path: Path, version: int) -> None:
    """100 MB are the limit and 90 are used, 50 of them by pages of files that were read."""
    if version == 2:
        names, prefix = ("memory.max", "memory.current", "memory.stat"), ""
    else:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        names, prefix = tuple(f"memory/{name}" for name in names), "total_"  # type: ignore[assignment]
        (tmp_path / "memory").mkdir()
    rows = {"anon": 40, "inactive_anon": 40, "inactive_file": 30, "active_file": 20}
    contents = (
        str(100 * MB),
        str(90 * MB),
        "".join(f"{prefix}{name} {value * MB}\n" for name, value in rows.items()),
    )
    for name, content in zip(names, contents, strict=True):
        (tmp_path / name).write_text(content)
    assert free_memory(tmp_path) == 60 * MB
