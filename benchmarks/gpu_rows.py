"""Rows of `make gpu-check`: what there is to run, its result, one line each, the table of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from benchmarks import gpu_cases, record
from harness import parity

# Offload to NVMe decides tensor by tensor.
SKIPPING = [name for name in parity.CASES | parity.GPU_CASES if "nvme" not in name]


class Extra(NamedTuple):
    """A case.

    Attributes:
        run: takes this rank's device; returns what is wrong, or None.
        strategy: case of the parity matrix whose strategy it needs; None for no strategy.
        gib: free memory of a GPU that it needs; 0 if a CPU can run it.
    """

    run: Callable[[torch.device], str | None]
    strategy: str | None = None
    gib: float = 0.0


def extras() -> dict[str, Extra]:
    """Lists the cases by name, in the order of running; those of one strategy are neighbours."""
    return {name: Extra(*rest) for name, *rest in _extras()}


def _extras() -> Iterator[tuple[Any, ...]]:
    for layout in gpu_cases.LAYOUTS:
        case = partial(gpu_cases.batchnorm, layout)
        for size, words in ((0, "all ranks"), (2, "groups of 2"), (1, "one rank")):
            yield f"syncbn {layout}, {words}", partial(case, size)
        yield f"syncbn {layout}, all ranks, summed", partial(case, 0, summed=True)
        yield f"syncbn {layout}, all ranks, bf16", partial(case, 0, dtype=torch.bfloat16)
    yield "pinned images", gpu_cases.pinned_images
    yield "record of collectives", gpu_cases.record_of_collectives
    for layout in ("contiguous", "channels_last"):
        large = partial(gpu_cases.large_batchnorm, layout)
        yield f"syncbn {layout}, 2**31 elements, bf16", large, None, gpu_cases.LARGE_GIB
    yield "snapshot of full memory", gpu_cases.snapshot_of_full_memory, None, 1.0
    yield "momentum on the host", gpu_cases.momentum_on_host, "ddp"
    for strategy in SKIPPING:
        for kind in gpu_cases.KINDS:
            yield f"skip {strategy}, {kind}", partial(gpu_cases.skip, strategy, kind), strategy
        yield f"timeouts {strategy}", partial(gpu_cases.timeouts, strategy), strategy


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
