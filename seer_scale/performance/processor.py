"""What Linux says of this processor: its name, and the instructions that make a precision fast."""

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
    there = processor_field("flags", "Features", cpuinfo=cpuinfo).split()
    return not set(BFLOAT16).isdisjoint(there)


def processor_field(*names: str, cpuinfo: Path = CPUINFO) -> str:
    """Reads a field of the first processor by one of its names; '' where there is none."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")
