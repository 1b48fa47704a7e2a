"""Measures the time of a training step and its parts, beside what others use instead.

    make bench
    python benchmarks/bench.py [step loss batchnorm strategies larc startup overhead] [--write]

Sections run one after the other on one machine; contenders of a section take turns. The stall of a
save (`make stall`) and the loader (`make bench-loader`) have benchmarks of their own; the table
repeats their results. `--write` puts the results into benchmarks/results/ and docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

import torch
import torch.distributed as dist

from benchmarks import bench_parts, record, train_step
from seer_scale.distributed.ports import free_port
from seer_scale.performance.host_memory import keep_freed_memory

COMMAND = "make bench"
DOCUMENT = record.ROOT / "docs" / "performance.md"
Row = dict[str, Any]

SPEED_UP, MEMORY_SHARE, RECOMPUTE_TIME, RECOMPUTE_MEMORY = 1.25, 1.0, 1.35, 0.55
TRAINER_OVERHEAD, SINKHORN_SHARE, LARC_SHARE, HELP_SECONDS = 0.02, 0.01, 0.6, 1.0


def step(repeats: int) -> tuple[list[Row], list[str]]:
    """Measures the training step at three sizes."""
    rows: list[Row] = []
    missed: list[str] = []
    for trunk, batch in (("regnety_400mf", 8), ("regnety_1_6gf", 4), ("regnety_8gf", 2)):
        found = {c.name: c for c in train_step.compare(trunk, batch, repeats)}
        ours, again = found[train_step.OURS], found[train_step.CHECKPOINTED]
        for name, contender in found.items():
            rows.append(
                {
                    "trunk": trunk,
                    "images a step": batch,
                    "way": name,
                    "ms an image": round(1e3 * contender.seconds, 1),
                    "against ours": round(contender.seconds / ours.seconds, 2),
                    "memory of a step, MiB": round(contender.memory / 2**20, 1),
                    "loss of the first step": round(contender.loss, 5),
                }
            )
        for name in (train_step.PLAIN, train_step.LIGHTLY):
            if name not in found:
                continue
            peer = found[name]
            checks = {
                f"{SPEED_UP}x faster": peer.seconds / ours.seconds >= SPEED_UP,
                "no more memory": ours.memory <= MEMORY_SHARE * peer.memory,
                "recomputing in time": again.seconds <= RECOMPUTE_TIME * peer.seconds,
                "recomputing in memory": again.memory <= RECOMPUTE_MEMORY * peer.memory,
            }
            missed += [f"{trunk} against {name}: {aim}" for aim, met in checks.items() if not met]
        if train_step.OURS_BF16 in found:
            low, plain = found[train_step.OURS_BF16], found[train_step.PLAIN_BF16]
            if plain.seconds < SPEED_UP * low.seconds:
                missed.append(f"{trunk} against {plain.name}: {SPEED_UP}x faster")
    return rows, missed


def loss(repeats: int) -> tuple[list[Row], list[str]]:
    """Measures SwAV's codes and loss at SEER's number of prototypes."""
    rows = bench_parts.loss(repeats)
    worst = max(row["share of the step's arithmetic"] for row in rows)
    return rows, [] if worst < SINKHORN_SHARE else [f"codes and loss take {worst:.1%} of a step"]


def batchnorm(repeats: int) -> tuple[list[Row], list[str]]:
    """Measures grouped SyncBatchNorm beside torch's BatchNorm."""
    return bench_parts.batchnorm(repeats), []


def strategies(repeats: int) -> tuple[list[Row], list[str]]:
    """Measures the step of every strategy beside DDP's, on two processes."""
    return bench_parts.strategies(repeats), []


def larc(repeats: int) -> tuple[list[Row], list[str]]:
    """Measures the optimizer's step beside a copy of as much memory."""
    rows = bench_parts.larc(repeats)
    share = rows[0]["share of copying"]
    return rows, [] if share >= LARC_SHARE else [f"LARC reaches {share:.0%} of copying"]


def startup(repeats: int) -> tuple[list[Row], list[str]]:
    """Measures the seconds until `--help` is printed and until the package is imported."""
    rows = bench_parts.startup(repeats)
    slow = [
        row["command"] for row in rows if "--help" in row["command"] and row["s"] > HELP_SECONDS
    ]
    return rows, [f"{command} takes more than {HELP_SECONDS:g} s" for command in slow]


def overhead(repeats: int) -> tuple[list[Row], list[str]]:
    """Measures the trainer's loop with MLflow beside the bare step."""
    rows = bench_parts.overhead(repeats)
    share = rows[0]["overhead"]
    return rows, [] if share < TRAINER_OVERHEAD else [f"the trainer costs {share:.1%}"]


SECTIONS: dict[str, Callable[[int], tuple[list[Row], list[str]]]] = {
    function.__name__: function
    for function in (step, loss, batchnorm, strategies, larc, startup, overhead)
}


def tables(found: dict[str, list[Row]]) -> str:
    """Writes a Markdown table per section."""
    parts = []
    for name, rows in found.items():
        title = (SECTIONS[name].__doc__ or "").strip().rstrip(".")
        table = record.markdown(list(rows[0]), [list(row.values()) for row in rows])
        parts.append(f"{title} (`{name}`):\n\n{table}")
    return "\n".join(parts)


def kept_elsewhere() -> str:
    """Reads the newest results of benchmarks that have their own commands."""
    lines = []
    for name, command in (("stall", "make stall"), ("loader", "make bench-loader")):
        for path in sorted(record.RESULTS.glob(f"{name}_*.json"))[-1:]:
            date = json.loads(path.read_text())["date"]
            lines.append(f"`{command}`: [{path.name}](../benchmarks/results/{path.name}), {date}.")
    return "\n".join(lines)


def main() -> int:
    """Measures and prints; returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", default=[], help="sections to run (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=11, help="measurements of each contender")
    parser.add_argument(
        "--write", action="store_true", help="write the JSON and docs/performance.md"
    )
    given = parser.parse_args()
    for name in given.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name!r}; there are: {', '.join(SECTIONS)}")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    dist.init_process_group("gloo")
    keep_freed_memory()  # as launch/pretrain.py does
    found: dict[str, list[Row]] = {}
    missed: list[str] = []
    for name in given.sections or SECTIONS:
        began = time.perf_counter()
        found[name], misses = SECTIONS[name](given.repeats)
        missed += misses
        print(f"{tables({name: found[name]})}\n{time.perf_counter() - began:.0f} s\n", flush=True)
    dist.destroy_process_group()
    if given.write:
        content = {"threads": torch.get_num_threads(), "missed": missed, **found}
        path = record.save("bench", COMMAND, content)
        words = f"{record.in_words(record.environment())}, {torch.get_num_threads()} threads."
        text = "\n\n".join([tables(found), kept_elsewhere(), words])
        path.with_suffix(".md").write_text(f"# `{COMMAND}`\n\n{text}\n")
        record.put_into(DOCUMENT, "bench", text)
    for miss in missed:
        print(f"missed: {miss}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
