"""Measures the numbers of `seer_scale/performance/hardware/cpu.yaml`, and checks planned times.

    python benchmarks/cpu_profile.py [--write]

One process per core: the peak of a matrix product, a copy of memory, gloo between two processes.
The efficiency is fitted to one trunk; the step times of the other trunks are predictions. `--write`
puts the results into benchmarks/results/ and docs/planner.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

import torch
import torch.distributed as dist

from benchmarks import record
from harness.engines import build_engine, forward_and_backward
from harness.pool import Pool
from seer_scale.config.recipe import parse
from seer_scale.performance.hardware import load_hardware
from seer_scale.planner import plan

COMMAND = "python benchmarks/cpu_profile.py --write"
DOCUMENT = record.ROOT / "docs" / "planner.md"
FITTED = "regnety_800mf"
SIZES = ("regnety_400mf", FITTED, "regnety_1_6gf", "regnety_3_2gf")
SECONDS = 900.0


def fastest(
    function: Callable[[], object], times: int, clock: Callable[[], float] = time.process_time
) -> float:
    """Seconds of the fastest of several calls: processor time, or wall time if the call waits."""
    found = []
    for _ in range(times):
        began = clock()
        function()
        found.append(clock() - began)
    return min(found)


def machine() -> dict[str, float]:
    """Measures one process while all other cores do the same."""
    dist.barrier()
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    peak = 2 * 1024**3 / fastest(lambda: a @ b, 20)
    source, target = torch.randn(2**25), torch.empty(2**25)
    copied = 2 * source.nbytes / fastest(lambda: target.copy_(source), 5)
    small, large = torch.zeros(1), torch.zeros(2**23)
    dist.all_reduce(small)
    latency = fastest(lambda: dist.all_reduce(small), 200, time.perf_counter)
    # Two ranks: each sends and receives the tensor once.
    link = large.nbytes / fastest(lambda: dist.all_reduce(large), 10, time.perf_counter)
    return {
        "TFLOP/s of a matrix product": peak / 1e12,
        "GB/s copied": copied / 1e9,
        "GB/s all-reduced": link / 1e9,
        "microseconds of an empty all-reduce": 1e6 * latency,
    }


def arguments(trunk: str, mode: str) -> list[str]:
    """Overrides of the recipe that is timed."""
    return [
        *("run.dir=unused", "data.path=unused", "tracking.enabled=false", "train.precision=fp32"),
        *("train.micro_batch_size=4", "data.crop_sizes=[128,64]", "data.crop_counts=[2,4]"),
        *("model.head_dims=[512,128]", "sharding.sync_bn_group_size=0", f"model.trunk={trunk}"),
        f"sharding.activation_checkpointing={mode}",
    ]


def step_seconds(trunk: str, mode: str) -> float:
    """Seconds of the fastest of some steps on one rank."""
    argv = ["--recipe", "swav_in1k_regnety_16gf", *arguments(trunk, mode)]
    config = parse(argv, recipes=record.ROOT / "launch" / "recipes", ranks=1).config
    engine, _ = build_engine(config)

    def step() -> None:
        forward_and_backward(engine, config)
        engine.step()

    step()
    return fastest(step, 4)


def alone(trunk: str, mode: str) -> float:
    """Runs `step_seconds` in a process of its own."""
    pool = Pool(1)
    try:
        return float(pool.run(step_seconds, trunk, mode, seconds=SECONDS)[0])
    finally:
        pool.close()


def main() -> int:
    """Measures and prints; --write also writes docs/planner.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write into docs/ and benchmarks/results/"
    )
    options = parser.parse_args()
    pool = Pool(2)
    try:
        ranks = pool.run(machine, seconds=SECONDS)
    finally:
        pool.close()
    steps = {(trunk, mode): alone(trunk, mode) for trunk in SIZES for mode in ("none", "full")}
    mean = {key: sum(rank[key] for rank in ranks) / len(ranks) for key in ranks[0]}
    for key, value in mean.items():
        print(f"{value:10.4g}  {key}")
    hardware = load_hardware("cpu")
    rows = []
    for (trunk, mode), measured in steps.items():
        planned = plan(
            "swav_in1k_regnety_16gf",
            hardware,
            nodes=1,
            gpus_per_node=1,
            strategy="ddp",
            overrides=arguments(trunk, mode),
        ).time
        if (trunk, mode) == (FITTED, "none"):
            computing = planned.forward + planned.backward
            fitted = hardware.efficiency * computing / (measured - planned.total + computing)
            print(f"{fitted:10.4g}  efficiency that makes {trunk} take what it took")
        off = f"{100 * (planned.total / measured - 1):+.0f} %"
        note = "fitted" if (trunk, mode) == (FITTED, "none") else off
        rows.append([f"`{trunk}`", mode, f"{measured:.2f}", f"{planned.total:.2f}", note])
    head = ["trunk", "recompute", "s measured", "s predicted", "off"]
    text = record.markdown(head, rows)
    print(text)
    if options.write:
        content = {"machine": mean, "steps": [[*key, value] for key, value in steps.items()]}
        record.save("cpu_profile", COMMAND, content)
        where = record.in_words(record.environment())
        record.put_into(DOCUMENT, "cpu-profile", f"`{COMMAND}`; {where}.\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
