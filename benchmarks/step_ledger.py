"""Counts what a step, a save and a resume cost the host; needs neither GPUs nor ranks.

    python benchmarks/step_ledger.py [--models MODEL ...] [--strategies STRATEGY ...]
                                     [--ranks RANKS ...] [--write]

Each cell is a process of its own that is one rank of torch's fake process group, which sends
nothing. Two ways, each for what it can:

- `gpu`: tensors without memory on a GPU that does not exist. Counts are those of a step on CUDA;
  no seconds, since such a tensor costs the host more than a real one. Not for DeepSpeed, whose
  buffers need memory.
- `cpu`: real tensors, two images of 32 pixels. CPU seconds of the process for the forward pass, the
  backward pass and the update, each the smallest of three steps; small kernels are in them, the
  same for every number of ranks. Not for the models that no CPU holds.

Three steps of real tensors come first: stage 3 of ZeRO records its order in two of them. The large
models are counted at the largest number of ranks only: a cell of them takes minutes. A second table
has what a save and a resume open, write and read (`ledger_files`).

The reducer of torch's DDP has no fake group: its all-reduces, one a bucket, are left out, and so
are its seconds. `--write` puts the results into benchmarks/results/ and docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clone works without installing the package

import torch  # noqa: E402

from benchmarks import ledger_files, record  # noqa: E402
from benchmarks.ledger_files import SAVED, FileCell, measure_files  # noqa: E402
from harness import engines  # noqa: E402
from harness.calls import Calls  # noqa: E402
from harness.fake_gpu import GPU, fake_gpu  # noqa: E402
from harness.fake_ranks import fake_ranks  # noqa: E402
from harness.host_time import timed_micro_batch  # noqa: E402
from seer_scale.config import RunConfig  # noqa: E402
from seer_scale.config.ds_config import ds_config_of  # noqa: E402
from seer_scale.config.recipe import parse  # noqa: E402
from seer_scale.optim.slice_sgd import apply_schedule  # noqa: E402
from seer_scale.train.build_engine import engine_of  # noqa: E402

COMMAND = "python benchmarks/step_ledger.py --write"
DOCUMENT = ROOT / "docs" / "performance.md"
MODELS = ("regnety_1_6gf", "seer_256gf", "seer_rg10b")
STRATEGIES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
RANKS = (2, 64, 512)
NODE = 8  # ranks of a node, which share a copy of the model under hsdp
ALLOWED = {("slice_sgd.py", "_whole_norms"): 1.0}  # float16's question about the gradient
STEPS = 3
T = TypeVar("T")
Way = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Cell:
    """One strategy of one model at one number of ranks.

    Attributes:
        model: trunk, or recipe of a whole model.
        strategy: strategy, with ZeRO's stage.
        ranks: ranks of the fake group.
        way: gpu or cpu; see above.
        aten: calls into ATen of a step, views included.
        collectives: calls of a step by kind.
        sent: MiB of a step by kind: the whole tensor of a gather, of a scatter or of a reduction.
        seconds: CPU seconds of forward pass, backward pass and update; none for the way gpu.
        problem: why there are no figures.
    """

    model: str
    strategy: str
    ranks: int
    way: Way
    aten: int = 0
    collectives: dict[str, int] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    seconds: tuple[float, ...] = ()
    problem: str = ""


def configuration(model: str, strategy: str, ranks: int, way: Way) -> RunConfig:
    """Configures a cell: a recipe as it is, or a trunk under SwAV's recipe with small crops.

    `TRUNK:PRECISION` is a trunk in another precision than float32.
    """
    arguments = engines.arguments_of(strategy, min(NODE, ranks))
    if model not in MODELS[1:]:
        small = engines.TINY if way == "cpu" else ()
        trunk, _, precision = model.partition(":")
        more = (*arguments, *small, f"model.trunk={trunk}")
        return engines.configuration(*more, precision=precision or "fp32")
    return parse(
        ["--recipe", model, *arguments], recipes=ROOT / "launch" / "recipes", ranks=ranks
    ).config


def measure(model: str, strategy: str, ranks: int, way: Way) -> Cell:
    """Measures a cell in this process, which can do it once: it is changed for good."""
    cell = Cell(model, strategy, ranks, way)
    os.chdir(ROOT)  # where DeepSpeed's configurations are found
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(min(NODE, ranks)))
    config = configuration(model, strategy, ranks, way)
    try:
        with fake_ranks(ranks, 0), _device(way) as device:
            return _measured(cell, config, device)
    except Exception as error:
        return replace(cell, problem=f"{type(error).__name__}: {error}"[:300])


@contextmanager
def _device(way: Way) -> Iterator[torch.device]:
    alone = patch("seer_scale.parallel.engine.wrap_ddp", lambda model, _: model)
    with alone:
        if way == "cpu":
            yield torch.device("cpu")
        else:
            with fake_gpu(ALLOWED):
                yield GPU


def _measured(cell: Cell, config: RunConfig, device: torch.device) -> Cell:
    engine = engine_of(config, engines.ones, ds_config_of(config, cell.ranks), device)
    apply_schedule(engine.param_groups, lr=0.0)

    def step() -> tuple[float, ...]:
        parts = [
            timed_micro_batch(engine, config, device)
            for _ in range(config.train.gradient_accumulation)
        ]
        return tuple(map(sum, zip(*parts, strict=True)))

    for _ in range(engines.WARM if cell.way == "cpu" else 1):
        step()  # makes the momentum and the buckets
    with Calls() as calls:
        step()
    spent = [step() for _ in range(STEPS)] if cell.way == "cpu" else []
    return replace(
        cell,
        aten=calls.aten,
        collectives=dict(calls.collectives),
        sent={kind: round(size / 2**20, 1) for kind, size in calls.bytes.items()},
        seconds=tuple(min(part) for part in zip(*spent, strict=True)),
    )


def cells(
    models: Sequence[str], strategies: Sequence[str], ranks: Sequence[int]
) -> Iterator[tuple[str, str, int, Way]]:
    """Lists the cells that are possible."""
    for model in models:
        for strategy in strategies:
            for count in ranks:
                large = model in MODELS[1:]
                if not strategy.startswith("zero") and (not large or count == max(ranks)):
                    yield model, strategy, count, "gpu"
                if not large:
                    yield model, strategy, count, "cpu"


def measure_save_and_resume(model: str, strategy: str, ranks: int) -> FileCell:
    """Measures the files of a cell in this process, which can do it once."""
    os.chdir(ROOT)
    config = configuration(model, strategy, ranks, "cpu")
    warm = configuration("regnety_debug", strategy, ranks, "cpu")
    return measure_files(model, strategy, ranks, config, warm)


def alone(
    measured: Callable[..., T], wanted: Sequence[tuple[Any, ...]], kind: Callable[..., T]
) -> Iterator[T]:
    """Measures cells one after the other, each in a process of its own.

    Args:
        measured: measures one cell, from the numbers of `wanted`.
        wanted: numbers of each cell.
        kind: makes a cell of the same numbers and a `problem`, for a process that was killed.
    """
    for one in wanted:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                yield pool.submit(measured, *one).result()
            except BrokenProcessPool:
                yield kind(*one, problem="its process was killed, perhaps for its memory")


def table(found: Sequence[Cell]) -> str:
    """Writes cells as Markdown."""
    rows = []
    for cell in found:
        kinds = [
            f"{number} {kind} ({cell.sent[kind]:,.1f})" for kind, number in cell.collectives.items()
        ]
        seconds = " + ".join(f"{part:.2f}" for part in cell.seconds)
        text = cell.problem or ", ".join(kinds) or "none"
        rows.append(
            [
                f"`{cell.model}`",
                cell.strategy,
                cell.ranks,
                cell.way,
                f"{cell.aten:,}",
                seconds,
                text,
            ]
        )
    head = ["model", "strategy", "ranks", "way", "ATen calls", "CPU s: forward + backward + update"]
    head.append("collectives (MiB)")
    return record.markdown(head, rows)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--write", action="store_true", help="write the JSON and the docs")
    options = parser.parse_args()
    wanted = options.models, options.strategies, options.ranks
    steps, files = [], []
    for cell in alone(measure, list(cells(*wanted)), Cell):
        steps.append(cell)
        print(table([cell]).splitlines()[-1], flush=True)
    saved = [cell for cell in product(*wanted) if cell[1] in SAVED]
    for kept in alone(measure_save_and_resume, saved, FileCell):
        files.append(kept)
        print(ledger_files.table([kept]).splitlines()[-1], flush=True)
    if options.write:
        where = record.in_words(record.environment())
        content = {"cells": [asdict(c) for c in steps], "files": [asdict(c) for c in files]}
        record.save("step_ledger", COMMAND, content)
        text = f"{where}.\n\n{table(steps)}\n\n{ledger_files.table(files)}"
        record.put_into(DOCUMENT, "step ledger", text)
    return 1 if any(cell.problem for cell in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
