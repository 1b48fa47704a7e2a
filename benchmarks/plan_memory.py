"""Measures the peak memory of a step on two gloo processes, beside the planner's prediction.

    python benchmarks/plan_memory.py [--write]

Measured is the rise of resident memory of the fullest rank: from a process that has trained this
model and dropped it, to the highest moment of a later step. So code, oneDNN's compiled kernels and
Python's objects do not count, and the plan leaves them out too (`reserved_gib` of the hardware
profile stands for them). `--write` puts the results into benchmarks/results/ and docs/planner.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

import torch.distributed as dist

from benchmarks import record
from harness.engines import CPU, build_engine, forward_and_backward
from harness.engines import STRATEGIES as SHARDING
from harness.pool import Pool
from harness.resident import resident_bytes
from seer_scale.config.recipe import parse
from seer_scale.planner import plan
from seer_scale.train import build

COMMAND = "python benchmarks/plan_memory.py --write"
DOCUMENT = record.ROOT / "docs" / "planner.md"
RECIPE = "swav_in1k_regnety_16gf"
OVERRIDES = (
    *("run.dir=unused", "data.path=unused", "tracking.enabled=false"),
    *("data.crop_sizes=[128,64]", "data.crop_counts=[2,4]", "model.head_dims=[512,128]"),
    "sharding.sync_bn_group_size=1",  # the same tensors, without a collective in every layer
)
# Images per rank: where activations are most, and where the state is.
SIZES = (("regnety_400mf", 8), ("regnety_1_6gf", 8), ("regnety_8gf", 2))
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
MODES = ("none", "full")
RANKS, STEPS = 2, 2  # DDP makes its buckets anew at the second
ALLOWED = 0.1
MIB = 2**20
SECONDS = 1500.0
# Every tensor above 64 KiB is a mapping of its own, so that resident memory falls when one is
# freed. Set before the processes start.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Cell:
    """Predicted and measured memory of one configuration.

    Attributes:
        trunk: name of the trunk.
        images: images per rank.
        strategy: a key of `planner.plan.STRATEGIES`.
        mode: value of `sharding.activation_checkpointing`.
        predicted: bytes by the planner.
        measured: bytes on the fullest rank.
    """

    trunk: str
    images: int
    strategy: str
    mode: str
    predicted: float
    measured: int

    @property
    def ratio(self) -> float:
        """Ratio of the prediction to the measurement."""
        return self.predicted / self.measured


def cells(trunk: str, images: int, strategy: str, precision: str = "fp32") -> list[Cell]:
    """Measures every mode of recomputation, one after the other in the same new processes."""
    lines = {mode: overrides(trunk, images, mode, precision) for mode in MODES}
    with patch.dict(os.environ, ENVIRONMENT), closing(Pool(RANKS)) as pool:
        measured = {}
        for mode, line in lines.items():
            argv = ["--recipe", RECIPE, *SHARDING[strategy], *line]
            measured[mode] = max(pool.run(rise, argv, seconds=SECONDS))
    return [
        Cell(trunk, images, strategy, mode, predicted(strategy, line), measured[mode])
        for mode, line in lines.items()
    ]


def overrides(trunk: str, images: int, mode: str, precision: str) -> list[str]:
    """Overrides of the recipe."""
    return [
        *OVERRIDES,
        f"model.trunk={trunk}",
        f"train.precision={precision}",
        f"train.micro_batch_size={images}",
        f"sharding.activation_checkpointing={mode}",
    ]


def predicted(strategy: str, line: Sequence[str]) -> float:
    """Bytes of a rank by the planner."""
    found = plan(RECIPE, "cpu", nodes=1, gpus_per_node=RANKS, strategy=strategy, overrides=line)
    return found.memory.total


def rise(arguments: Sequence[str]) -> int:
    """Measures the bytes by which this rank's resident memory rises; every rank calls it."""
    config = parse(arguments, recipes=record.ROOT / "launch" / "recipes", ranks=1).config
    engine = trained(config, 1)
    if hasattr(engine, "_engine"):
        engine._engine.destroy()
    del engine
    settle()
    before = resident_bytes("VmRSS")
    engine = trained(config, STEPS)
    settle()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts afresh
    step(engine, config)
    return resident_bytes("VmHWM") - before


def trained(config: Any, steps: int) -> Any:
    """Builds an engine and takes some steps."""
    engine, _ = build_engine(config)
    for _ in range(steps):
        step(engine, config)
    return engine


def step(engine: Any, config: Any) -> None:
    """Takes one step, on crops in the trainer's memory format."""
    memory_format = build.memory_format_of(config.train.memory_format, CPU)
    forward_and_backward(engine, config, memory_format)
    engine.step()


def settle() -> None:
    """Returns unused memory to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def table(found: Sequence[Cell]) -> str:
    """Writes a table of MiB on the fullest rank."""
    head = ["trunk", "images", "strategy", "recompute", "MiB predicted", "MiB measured", "ratio"]
    rows = [
        [
            *(f"`{cell.trunk}`", cell.images, cell.strategy, cell.mode),
            *(f"{cell.predicted / MIB:.0f}", f"{cell.measured / MIB:.0f}", f"{cell.ratio:.3f}"),
        ]
        for cell in found
    ]
    return record.markdown(head, rows)


def main() -> int:
    """Measures and prints; returns 1 if a prediction is more than a tenth off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write into docs/ and benchmarks/results/"
    )
    options = parser.parse_args()
    found: list[Cell] = []
    for strategy, (trunk, images) in itertools.product(STRATEGIES, SIZES):
        found += cells(trunk, images, strategy)
        print(*table(found[-len(MODES) :]).splitlines()[2:], sep="\n", flush=True)
    text = table(sorted(found, key=lambda cell: SIZES.index((cell.trunk, cell.images))))
    print(text)
    if options.write:
        record.save("plan_memory", COMMAND, {"cells": [asdict(cell) for cell in found]})
        where = record.in_words(record.environment())
        record.put_into(DOCUMENT, "plan-memory", f"`{COMMAND}`; {where}.\n\n{text}")
    return 1 if any(abs(cell.ratio - 1) > ALLOWED for cell in found) else 0


if __name__ == "__main__":
    sys.exit(main())
