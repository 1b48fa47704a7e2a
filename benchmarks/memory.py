"""`make bench-memory`: bytes per rank under every strategy, and what recomputing activations saves.

State is read off the tensors of an engine that is about to make its second step, and set beside
the formula of `parallel/state_bytes.py`. Activations are counted as they come and go, and set
beside the profile that `auto` plans by. On CPU with gloo: a tensor has as many bytes anywhere.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterable, Iterator
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
from harness.pool import Pool
from seer_scale import distributed
from seer_scale.config import RunConfig
from seer_scale.config.ds_config import load_ds_config, resolve_ds_config
from seer_scale.config.recipe import parse
from seer_scale.models import seeded_values
from seer_scale.objectives import build_objective
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.optim.slices import local
from seer_scale.parallel.activation_budget import RecomputePlan
from seer_scale.parallel.activation_profile import profile_activations
from seer_scale.parallel.engine import Engine, recompute_plan, shard
from seer_scale.parallel.live_bytes import LiveBytes
from seer_scale.parallel.state_bytes import StateBytes, state_bytes
from seer_scale.parallel.torch_engine import TorchEngine
from seer_scale.train import build

COMMAND = "make bench-memory"
RECIPE = "swav_in1k_regnety_16gf"
# Name -> arguments of launch/pretrain.py; hsdp shares a copy between two ranks.
STRATEGIES: dict[str, tuple[str, ...]] = {
    "ddp": ("sharding.strategy=ddp",),
    "fsdp": ("sharding.strategy=fsdp",),
    "hsdp": ("sharding.strategy=hsdp", "sharding.shard_size=2"),
    **{f"zero{n}": ("--deepspeed_config", f"ds_configs/zero{n}.json") for n in range(4)},
}
RANKS = (1, 2, 4)
# State does not depend on them; of activations there are as many as take seconds on a CPU.
TINY = ("train.micro_batch_size=2", "data.crop_sizes=[32]", "data.crop_counts=[2]")
CROPS = ("train.micro_batch_size=4", "data.crop_sizes=[128,64]", "data.crop_counts=[2,6]")
TIMED_STEPS = 4
SECONDS = 1800.0  # that ranks may take to answer
GIB = 2**30
CPU = torch.device("cpu")


@dataclass(frozen=True)
class State:
    """Bytes on one rank, measured and by the formula; see `StateBytes`.

    Attributes:
        measured: storages of the tensors that are parameters, gradients, optimizer state.
        expected: what the formula says.
        rest: storages of every other tensor: BatchNorm's statistics, buckets of communication.
    """

    measured: StateBytes
    expected: StateBytes
    rest: int

    @property
    def difference(self) -> float:
        """Of the sums, relative to the formula."""
        return self.measured.total / self.expected.total - 1


@dataclass(frozen=True)
class Activations:
    """One mode of activation checkpointing.

    Attributes:
        mode: as configured.
        recomputed: number of blocks.
        peak: most bytes that a step took beside weights, gradients and momentum.
        profiled: what the profile says.
        seconds: of CPU time, of the fastest step; one thread works.
    """

    mode: str
    recomputed: int
    peak: int
    profiled: int
    seconds: float


def configuration(*more: str) -> RunConfig:
    """The recipe's model in float32."""
    argv = [
        *("--recipe", RECIPE, "run.dir=unused", "data.path=unused", "tracking.enabled=false"),
        *("train.precision=fp32", "sharding.sync_bn_group_size=0"),
        *more,
    ]
    return parse(argv, recipes=record.ROOT / "launch" / "recipes").config


def build_engine(
    config: RunConfig, plan: RecomputePlan | None = None, device: torch.device | None = None
) -> tuple[Engine, dict[str, Any]]:
    """What a training builds on this rank, on the CPU unless told otherwise; and
    zero_optimization, if there is one.
    """
    path, ds_config = config.sharding.deepspeed_config, None
    if path is not None:
        ds_config = resolve_ds_config(
            load_ds_config(record.ROOT / path),
            path=path,
            config=config,
            world_size=distributed.world_size(),
        )
    source = partial(seeded_values, seed=config.run.seed)
    engine = shard(partial(build.model_of, config), source, config, ds_config, device or CPU, plan)
    apply_schedule(engine.param_groups, lr=0.01)
    return engine, (ds_config or {}).get("zero_optimization", {})


def images_of(config: RunConfig) -> list[tuple[int, int]]:
    """Per resolution the images of a micro-batch and their size."""
    images = [count * config.train.micro_batch_size for count in config.data.crop_counts]
    return list(zip(images, config.data.crop_sizes, strict=True))


def forward_and_backward(
    engine: Engine,
    config: RunConfig,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    """With the run's objective, on noise; only the engine's own tensors outlive it."""
    objective = build_objective(
        config.objective.name,
        crops=sum(config.data.crop_counts),
        options=config.objective.options,
    )
    crops = [
        torch.randn(count, 3, size, size).contiguous(memory_format=memory_format)
        for count, size in images_of(config)
    ]
    embeddings, scores = engine(crops, None)
    loss, _ = objective(embeddings, scores)
    engine.backward(loss)


# ------------------------------------------------------------------------------- state


def measure_state(strategy: str, *more: str) -> State:
    """This rank's bytes between the second backward pass and its step; every rank calls it.

    `rest` is right in a process that has no other tensors.
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


def held_by(engine: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, gradients, optimizer state: the tensors that an engine keeps them in."""
    own = list(engine.model.parameters())
    state = [tensor for held in engine._optimizer.state.values() for tensor in held.values()]
    gradients = [parameter.grad for parameter in own if parameter.grad is not None]
    if isinstance(engine, TorchEngine) or engine._stage == 0:
        return own, gradients, state
    zero = engine._engine.optimizer
    gradients += [part for parts in zero.averaged_gradients.values() for part in parts or []]
    if engine._stage < 3:
        return own, gradients, [*state, *zero.single_partition_of_fp32_groups]
    slices = [parameter.ds_tensor for parameter in own]
    return [*own, *slices], gradients, [*state, *zero.fp32_partitioned_groups_flat]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address of what lies behind tensors, each once."""
    found = [local(tensor.detach()).untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def alive() -> Iterator[Tensor]:
    """Every tensor with memory that Python knows of; a compiler's fake ones have none."""
    gc.collect()
    for found in gc.get_objects():
        kind = type(found)
        if issubclass(kind, Tensor) and not issubclass(kind, FakeTensor) and not found.is_meta:
            yield found


# ------------------------------------------------------------------------------- activations


def measure_activations(steps: int, *more: str) -> list[Activations]:
    """Modes none, auto with half of what none takes, and full, in one process.

    Steps of the modes take turns, so that a machine that gets slower does so for all; the fastest
    of each counts.
    """
    configs = [configuration(*STRATEGIES["ddp"], *CROPS, *more)]
    model_of, images = partial(build.model_of, configs[0]), images_of(configs[0])
    profile = profile_activations(model_of, images, configs[0].train.precision)
    half = profile.peak(frozenset()) / 2 / GIB
    modes = ["none", f"auto:{half:.3g}", "full"]
    for mode in modes[1:]:
        option = f"sharding.activation_checkpointing={mode}"
        configs.append(configuration(*STRATEGIES["ddp"], *CROPS, *more, option))
    plan = recompute_plan(model_of, configs[1])
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
    """Most bytes of a step beside parameters, gradients and momentum."""
    with LiveBytes() as live:
        forward_and_backward(engine, config)
    gradients = [parameter.grad for parameter in engine.model.parameters()]
    peak: int = live.peak(without=gradients)
    engine.step()
    return peak


# ------------------------------------------------------------------------------- the command


def main() -> int:
    """Measures, writes JSON, tables and plot; status 1 if something is 5 % off its formula."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-docs", action="store_true", help="leave docs/ as it is")
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
    """What a function returns on every rank of a new pool of processes."""
    pool = Pool(ranks)
    try:
        return pool.run(function, *arguments, seconds=SECONDS)
    finally:
        pool.close()


if __name__ == "__main__":
    sys.exit(main())
