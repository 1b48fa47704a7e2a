"""Counts what one rank opens, writes and reads at a save and at a resume; part of `step_ledger`.

The checkpoint is real and as large as the model's, with holes for numbers (`harness.reads`). The
rank is number 1 of torch's fake process group: rank 0 adds the manifest, the index and the trunk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import record
from harness import reads
from seer_scale.config import RunConfig
from seer_scale.train import build

# Of a checkpoint as `write_sparse` cuts it. DeepSpeed pads the slices of zero1 and zero2.
SAVED = {"ddp": "ddp", "fsdp": "fsdp", "zero3": "zero"}
MOST_BYTES = 8 << 30  # weights and momenta of a rank that this measurement takes into memory


@dataclass(frozen=True)
class FileCell:
    """One strategy of one model at one number of ranks.

    Attributes:
        model: trunk, or recipe of a whole model.
        strategy: strategy, with ZeRO's stage.
        ranks: ranks of the fake group.
        kept: MiB of weights, momenta, buffers and own state that the rank holds.
        save: opens of files, and MiB that the rank wrote.
        resume: opens of files, and MiB that the rank read.
        problem: why there are no figures.
    """

    model: str
    strategy: str
    ranks: int
    kept: float = 0.0
    save: tuple[int, float] = (0, 0.0)
    resume: tuple[int, float] = (0, 0.0)
    problem: str = ""


def measure_files(
    model: str, strategy: str, ranks: int, config: RunConfig, warm: RunConfig
) -> FileCell:
    """Measures a cell in this process, which can do it once: DeepSpeed remembers its group.

    Args:
        model: name for the table.
        strategy: a key of `SAVED`.
        ranks: number of ranks that saved and resume.
        config: configuration of the run.
        warm: configuration of a small engine, which is built before anything is counted.
    """
    cell = FileCell(model, strategy, ranks)
    whole = build.model_of(config, reads.META)
    state = 8 * sum(parameter.numel() for parameter in whole.parameters())
    share = state if strategy == "ddp" else state // ranks
    if share > MOST_BYTES:
        return replace(cell, problem=f"a rank keeps {share / 2**30:.0f} GiB: not measured")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "step_00000007"
        try:
            reads.write_sparse(folder, whole, SAVED[strategy], ranks)
            read, wrote = reads.reads_and_writes(folder, config, ranks, 1, warm)
        except Exception as error:
            return replace(cell, problem=f"{type(error).__name__}: {error}"[:300])
    return replace(
        cell,
        kept=_mib(read.kept),
        save=(wrote.opens.total(), _mib(wrote.bytes)),
        resume=(read.opens.total(), _mib(read.bytes)),
    )


def table(found: Sequence[FileCell]) -> str:
    """Writes cells as Markdown."""
    head = ["model", "strategy", "ranks", "kept MiB", "save: opens", "MiB written"]
    head += ["resume: opens", "MiB read", "read / kept"]
    rows = []
    for cell in found:
        row = [f"`{cell.model}`", cell.strategy, cell.ranks]
        if cell.problem:
            rows.append([*row, cell.problem, *[""] * (len(head) - 4)])
            continue
        row += [f"{cell.kept:,.1f}", cell.save[0], f"{cell.save[1]:,.1f}"]
        row += [cell.resume[0], f"{cell.resume[1]:,.1f}", f"{cell.resume[1] / cell.kept:.2f}"]
        rows.append(row)
    return record.markdown(head, rows)


def _mib(count: int) -> float:
    return round(count / 2**20, 1)
