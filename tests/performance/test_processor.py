"""Instructions for bfloat16, as Linux names them on processors of several makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from seer_scale.performance.processor import multiplies_bfloat16


@pytest.mark.parametrize(
    ("line", "there"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile", True),  # Sapphire Rapids
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni", True),  # Zen 4
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),  # Ice Lake
        ("flags\t\t: fpu sse4_2 avx2", False),  # Zen 3
        ("Features\t: fp asimd svebf16 i8mm bf16", True),  # Neoverse V1
        ("Features\t: fp asimd asimdhp", False),  # Neoverse N1
        ("model name\t: a processor named bf16", False),
    ],
)
def test_flags_of_processors(tmp_path: Path, line: str, there: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\npower management:\n")
    assert multiplies_bfloat16(cpuinfo) is there


def test_without_the_file_nothing_is_claimed(tmp_path: Path) -> None:
    assert not multiplies_bfloat16(tmp_path / "absent")
