"""The instructions of this processor that decide which precision is fast on it."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# x86-64, then ARM: products of bfloat16 with sums in float32.
BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")


def multiplies_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Tells whether this processor has instructions for products of bfloat16.

    Without them a product in bfloat16 is one in float32, with conversions before and after it.

    Args:
        cpuinfo: description of the processor by Linux; False where there is none.
    """
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not set(BFLOAT16).isdisjoint(flags.partition(":")[2].split())
