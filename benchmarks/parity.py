"""Measures the largest difference of every strategy from a plain torch loop on CPU (gloo).

    make parity
    python benchmarks/parity.py [--no-docs]

Cases and plain loop are those of harness/parity.py. `make gpu-check` is the same on
GPUs. Results go into benchmarks/results/, and the tables into docs/sharding.md unless `--no-docs`
is given.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from harness.parity import (
    CASES,
    STEPS,
    Result,
    plain_loop,
    train,
    worst_loss,
    worst_tensor,
)
from harness.pool import Pool
from seer_scale.parallel.zero import missing_for_nvme

COMMAND = "make parity"
DOCUMENT = record.ROOT / "docs" / "sharding.md"
WORLD_SIZES = (1, 2, 4)
SECONDS = 1500  # per case; offload to NVMe takes minutes


def main() -> int:
    """Runs matrix and world sizes, writes JSON and tables; returns 0 if all agree to 1e-4."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=list(CASES), metavar="CASE", help="cases to run"
    )
    parser.add_argument("--no-docs", action="store_true", help="do not change docs/sharding.md")
    arguments = parser.parse_args()
    plain = plain_loop()
    pools = {size: Pool(size) for size in WORLD_SIZES}
    rows: list[dict[str, Any]] = []
    missing = {name: reason for name in arguments.only if (reason := missing_for(name))}
    for name, reason in missing.items():
        print(f"{name}: not run, since {reason}", flush=True)
    try:
        base: dict[int, Result] = {}
        for size in WORLD_SIZES:
            base[size] = pools[size].run(train, "ddp")[0]
        for name in [name for name in arguments.only if name not in missing]:
            size = CASES[name].world_size
            for checkpointing in ("none", "full"):
                result = pools[size].run(train, name, checkpointing, seconds=SECONDS)[0]
                rows.append(compare(name, size, checkpointing, result, plain, base[size]))
        for name in ("ddp", "fsdp", "zero1", "zero2", "zero3"):
            for size in WORLD_SIZES:
                if name in arguments.only:
                    result = pools[size].run(train, name)[0]
                    rows.append(compare(name, size, "worlds", result, plain, base[size]))
    finally:
        for pool in pools.values():
            pool.close()
    print(record.save("parity", COMMAND, {"steps": STEPS, "rows": rows, "not run": missing}))
    if not arguments.no_docs:
        write_tables(rows, missing)
    worst = [max(row["loss"], row["parameters"], row["buffers"]) for row in rows]
    return int(max(worst, default=0.0) > 1e-4)


def missing_for(name: str) -> str | None:
    """Reason why a case cannot run on this machine, as part of a sentence; None if it can."""
    return missing_for_nvme() if "nvme" in name else None


def compare(
    name: str, size: int, checkpointing: str, result: Result, plain: Result, ddp: Result
) -> dict[str, Any]:
    """Largest differences from the plain loop, and from DDP on as many ranks."""
    parameters, buffers = worst_tensor(result.tensors, plain.tensors)
    row = {
        "case": name,
        "ranks": size,
        "checkpointing": checkpointing,
        "loss": worst_loss(result.losses, plain.losses),
        "parameters": parameters,
        "buffers": buffers,
        "loss_to_ddp": worst_loss(result.losses, ddp.losses),
        "parameters_to_ddp": max(worst_tensor(result.tensors, ddp.tensors)),
    }
    print(row, flush=True)
    return row


def write_tables(rows: list[dict[str, Any]], missing: dict[str, str]) -> None:
    """Puts both tables into docs/sharding.md, with the cases that did not run."""
    source = f"`{COMMAND}`; {record.in_words(record.environment())}."
    header = ["strategy", "ranks", "recompute", "loss", "parameters", "buffers", "loss to DDP"]
    matrix = [
        [r["case"], r["ranks"], r["checkpointing"], *figures(r)]
        for r in rows
        if r["checkpointing"] != "worlds"
    ]
    worlds = [[r["case"], r["ranks"], *figures(r)] for r in rows if r["checkpointing"] == "worlds"]
    notes = [f"\n`{name}` was not run: {reason}." for name, reason in missing.items()]
    table = "\n".join([record.markdown(header, matrix), *notes])
    record.put_into(DOCUMENT, "parity", f"{source}\n\n{table}")
    del header[2]
    record.put_into(DOCUMENT, "worlds", f"{source}\n\n{record.markdown(header, worlds)}")


def figures(row: dict[str, Any]) -> list[str]:
    """Writes the differences with two digits, or that all bits are equal."""
    to_ddp = max(row["loss_to_ddp"], row["parameters_to_ddp"])
    last = f"{row['loss_to_ddp']:.1e}" if to_ddp else "equal to the last bit"
    return [f"{row[key]:.1e}" for key in ("loss", "parameters", "buffers")] + [last]


if __name__ == "__main__":
    sys.exit(main())
