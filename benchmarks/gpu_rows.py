"""Rows of `make gpu-check`: what was run, its result, one line each, and the table of all."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from benchmarks import record
from benchmarks.gpu_cases import extras

EXTRAS = extras()


@dataclass(frozen=True)
class Variant:
    """One training of the matrix."""

    case: str
    checkpointing: str = "none"
    precision: str = "fp32"
    syncbn: str = "native"

    def __str__(self) -> str:
        if self.case in EXTRAS:
            return self.case
        parts = [self.case, f"recompute {self.checkpointing}", self.precision]
        return ", ".join(parts + [f"syncbn {self.syncbn}"] * (self.syncbn != "native"))


@dataclass(frozen=True)
class Row:
    """Result of a variant: differences as in `parity`, None if nothing was trained."""

    variant: Variant
    status: Literal["ok", "failed", "skipped"]
    why: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0
    seconds: float = 0.0


def figures(row: Row) -> str:
    """Writes the differences with two digits, or the reason why there are none."""
    shown = [f"{name} {value:.1e}" for name, value in row.differences.items()]
    if row.skipped_steps:
        shown.append(f"{row.skipped_steps} steps skipped by the loss scale")
    return "; ".join(shown) if shown else row.why.splitlines()[-1] if row.why else ""


def report(rows: list[Row]) -> int:
    """Prints the table and then the failures; returns the exit status."""
    header = ["case", "recompute", "precision", "syncbn", "result", "differences", "s"]
    cells = [
        [*asdict(row.variant).values(), row.status, figures(row), f"{row.seconds:.0f}"]
        for row in rows
    ]
    print(f"\n{record.markdown(header, cells)}")
    failed = [row for row in rows if row.status == "failed"]
    done = sum(row.status == "ok" for row in rows)
    skipped = len(rows) - done - len(failed)
    print(f"{done} as they should be, {skipped} skipped, {len(failed)} failed")
    for row in failed:
        print(f"FAILED {row.variant}: {row.why}")
    return 1 if failed or not done else 0
