"""Measures bytes per rank under every strategy, and what recomputing activations saves.

    make bench-memory
    python benchmarks/memory.py [--no-docs]

State is the tensors of an engine before its second step, beside the formula of
`parallel/state_bytes.py`. Activations are counted as tensors come and go, beside the profile that
`auto:GIB` plans with. Runs on CPU with gloo, where tensors have the same bytes as on a GPU. Results
go into benchmarks/results/, and tables and plot into docs/ unless `--no-docs` is given.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks import memory_report, record
from harness.engines import (
    RECIPE,
    STRATEGIES,
    TINY,
    build_engine,
    configuration,
    forward_and_backward,
    held_by,
    images_of,
    storages,
)
from harness.pool import Pool
from seer_scale import distributed
from seer_scale.config import RunConfig
from seer_scale.parallel.activation_profile import profile_activations
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.live_bytes import LiveBytes
from seer_scale.parallel.state_bytes import StateBytes, state_bytes
from seer_scale.train import build
from seer_scale.train.build_engine import recompute_plan_of

COMMAND = "make bench-memory"
RANKS = (1, 2, 4)
CROPS = ("train.micro_batch_size=4", "data.crop_sizes=[128,64]", "data.crop_counts=[2,6]")
TIMED_STEPS = 4
SECONDS = 1800.0  # longest time of a measurement
GIB = 2**30


@dataclass(frozen=True)
class State:
    """Bytes on one rank, measured and by the formula.

    Attributes:
        measured: storages of parameters, gradients and optimizer state.
        expected: the same by the formula.
        rest: storages of all other tensors: BatchNorm's statistics, buckets of communication.
    """

    measured: StateBytes
    expected: StateBytes
    rest: int

    @property
    def difference(self) -> float:
        """Relative difference of the measured sum from the formula."""
        return self.measured.total / self.expected.total - 1


@dataclass(frozen=True)
class Activations:
    """Memory and time of one mode of activation checkpointing.

    Attributes:
        mode: value of `sharding.activation_checkpointing`.
        recomputed: number of recomputed blocks.
        peak: peak bytes of a step beside weights, gradients and momentum.
        profiled: the same by the profile.
        seconds: CPU seconds of the fastest step; one thread works.
    """

    mode: str
    recomputed: int
    peak: int
    profiled: int
    seconds: float


# ------------------------------------------------------------------------------- state


def measure_state(strategy: str, *more: str) -> State:
    """Measures this rank's bytes between the second backward pass and its step.

    Every rank calls it, in a process without other tensors.
    """
    config = configuration(*STRATEGIES[strategy], *TINY, *more)
    engine, zero = build_engine(config)
    forward_and_backward(engine, config)
    engine.step()
    forward_and_backward(engine, config)
    held = [storages(tensors) for tensors in held_by(engine)]
    rest = {key: size for key, size in storages(alive()).items() if not any(key in h for h in held)}
    whole = build.model_of(config, torch.device("meta"))
    expected = state_bytes(
        [parameter.numel() for parameter in whole.parameters()],
        config.sharding.strategy,
        config.sharding.shard_size or distributed.world_size(),
        stage=zero.get("stage", 0),
        persistent=zero.get("stage3_param_persistence_threshold", 0),
    )
    engine.step()
    measured = StateBytes(*[sum(found.values()) for found in held])
    return State(measured, expected, sum(rest.values()))


def alive() -> Iterator[Tensor]:
    """Finds every tensor with memory; a compiler's fake tensors have none."""
    gc.collect()
    for found in gc.get_objects():
        kind = type(found)
        if issubclass(kind, Tensor) and not issubclass(kind, FakeTensor) and not found.is_meta:
            yield found


# ------------------------------------------------------------------------------- activations


def measure_activations(steps: int, *more: str) -> list[Activations]:
    """Measures modes none, auto with half of the memory of none, and full, in one process.

    Steps of the modes take turns, so that a machine that slows down does so for all; the fastest
    step of each mode counts.
    """
    configs = [configuration(*STRATEGIES["ddp"], *CROPS, *more)]
    model_of, images = partial(build.model_of, configs[0]), images_of(configs[0])
    profile = profile_activations(model_of, images, configs[0].train.precision)
    half = profile.peak(frozenset()) / 2 / GIB
    modes = ["none", f"auto:{half:.3g}", "full"]
    for mode in modes[1:]:
        option = f"sharding.activation_checkpointing={mode}"
        configs.append(configuration(*STRATEGIES["ddp"], *CROPS, *more, option))
    plan = recompute_plan_of(configs[1])
    assert plan is not None
    recomputed = [frozenset[int](), plan.recomputed, frozenset(range(plan.blocks))]
    engines = [build_engine(config, plan)[0] for config in configs]
    peaks = [activation_peak(*pair) for pair in zip(engines, configs, strict=True)]
    seconds = [float("inf")] * len(modes)
    for _ in range(steps):
        for index, engine in enumerate(engines):
            began = time.process_time()
            forward_and_backward(engine, configs[index])
            engine.step()
            seconds[index] = min(seconds[index], time.process_time() - began)
    return [
        Activations(mode, len(chosen), peak, profile.peak(chosen), second)
        for mode, chosen, peak, second in zip(modes, recomputed, peaks, seconds, strict=True)
    ]


def activation_peak(engine: Engine, config: RunConfig) -> int:
    """Measures the peak bytes of a step beside parameters, gradients and momentum."""
    with LiveBytes() as live:
        forward_and_backward(engine, config)
    gradients = [parameter.grad for parameter in engine.model.parameters()]
    peak: int = live.peak(without=gradients)
    engine.step()
    return peak


# ------------------------------------------------------------------------------- the command


def main() -> int:
    """Measures, writes JSON, tables and plot; returns 1 if a state is 5 % off its formula."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-docs", action="store_true", help="do not change docs/")
    options = parser.parse_args()
    states: dict[str, dict[int, list[State]]] = {name: {} for name in STRATEGIES}
    for name, ranks in [(name, ranks) for name in STRATEGIES for ranks in RANKS]:
        if name != "hsdp" or ranks % 2 == 0:
            states[name][ranks] = fresh(ranks, measure_state, name)
            print(name, ranks, asdict(states[name][ranks][0]), flush=True)
    activations = fresh(1, measure_activations, TIMED_STEPS)[0]
    print(*activations, sep="\n", flush=True)
    content = {
        "recipe": RECIPE,
        "state": [
            {"strategy": name, "ranks": ranks, "rank": rank, **asdict(state)}
            for name, by_ranks in states.items()
            for ranks, everyone in by_ranks.items()
            for rank, state in enumerate(everyone)
        ],
        "activations": [asdict(mode) for mode in activations],
    }
    path = record.save("memory", COMMAND, content)
    print(f"kept in {path.relative_to(record.ROOT)}")
    if not options.no_docs:
        memory_report.write(content)
    off = [abs(s.difference) for by in states.values() for ranks in by.values() for s in ranks]
    return 1 if max(off) > 0.05 else 0


def fresh(ranks: int, function: Any, *arguments: Any) -> list[Any]:
    """Calls a function on every rank of a new pool of processes; returns all results."""
    pool = Pool(ranks)
    try:
        return pool.run(function, *arguments, seconds=SECONDS)
    finally:
        pool.close()


if __name__ == "__main__":
    sys.exit(main())
