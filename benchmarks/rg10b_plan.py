"""Measures what each of 64 ranks holds of RG-10B, without 64 ranks.

    make rg10b-plan
    python benchmarks/rg10b_plan.py [--ranks RANKS] [--show RANK ...]

Some ranks are built for real, each in a process of its own, by the project's own `shard()` on
torch's fake process group, which has any number of ranks and sends nothing. The printed bytes are
those of their tensors. With default options, results go into benchmarks/results/ and
docs/sharding.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, pairwise
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clone works without installing the package

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import record  # noqa: E402
from harness.fake_ranks import fake_ranks  # noqa: E402
from harness.resident import resident_bytes  # noqa: E402
from seer_scale.config import RunConfig  # noqa: E402
from seer_scale.config.recipe import parse  # noqa: E402
from seer_scale.models import seeded_values  # noqa: E402
from seer_scale.optim.slices import local  # noqa: E402
from seer_scale.parallel.engine import Engine  # noqa: E402
from seer_scale.parallel.fsdp import unit_parameters  # noqa: E402
from seer_scale.parallel.precision import gathered_as  # noqa: E402
from seer_scale.train import build  # noqa: E402
from seer_scale.train.build_engine import engine_of  # noqa: E402

COMMAND = "make rg10b-plan"
TRUNK, RANKS, SHOWN = "rg_10b", 64, (0, 1, 31, 63)
LIMIT_GIB = 2.0  # resident memory that building one rank may need
GIB = 2**30
FLOAT = 4


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together, without those of units inside the unit.

    Attributes:
        name: name of the module.
        tensors: number of parameter tensors.
        parameters: elements of the whole tensors.
        here: elements that the rank holds.
        gathered: bytes of the whole tensors, as they are gathered.
    """

    name: str
    tensors: int
    parameters: int
    here: int
    gathered: int


@dataclass(frozen=True)
class Rank:
    """One rank as built; memory in bytes.

    Attributes:
        rank: number of the rank.
        parameters: the rank's slices of the weights; all gradients together are as large.
        momentum: the rank's slices of the momentum.
        buffers: BatchNorm's buffers, which every rank holds whole.
        imports: resident memory of the process before building.
        peak: peak resident memory of the process.
        seconds: CPU seconds of building, initial values included.
        units: the wrapping plan.
        gathered: largest bytes of whole weights at one time of a forward pass.
        recomputed: bytes of whole weights of the largest recomputed region.
    """

    rank: int
    parameters: int
    momentum: int
    buffers: int
    imports: int
    peak: int
    seconds: float
    units: tuple[Unit, ...]
    gathered: int
    recomputed: int


def configuration(trunk: str, *more: str) -> RunConfig:
    """Resolves RG-10B's recipe under strategy fsdp, with a given trunk."""
    one = "train.gradient_accumulation=1"
    keys = (f"model.trunk={trunk}", "sharding.strategy=fsdp", one, *more)
    arguments = ["--recipe", "seer_rg10b", *keys]
    return parse(arguments, recipes=ROOT / "launch" / "recipes", ranks=1).config


def build_engine(config: RunConfig) -> Engine:
    """Builds a training's engine on this rank on the CPU: slices with their initial values."""
    source = partial(seeded_values, seed=config.run.seed)
    return engine_of(config, source, None, torch.device("cpu"))


def measure(trunk: str, ranks: int, rank: int) -> Rank:
    """Builds a rank with its momentum; needs a fresh process, whose peak memory counts."""
    imports = resident_bytes("VmHWM")
    config = configuration(trunk)
    with fake_ranks(ranks, rank):
        began = time.process_time()
        engine = build_engine(config)
        momentum = sum(part.momentum.numel() for part in engine.slices())  # created by the access
        seconds = time.process_time() - began
        model = engine.model
        return Rank(
            rank=rank,
            parameters=FLOAT * sum(local(p.detach()).numel() for p in model.parameters()),
            momentum=FLOAT * momentum,
            buffers=sum(buffer.nbytes for buffer in model.buffers()),
            imports=imports,
            peak=resident_bytes("VmHWM"),
            seconds=seconds,
            units=tuple(units_of(model, config)),
            gathered=gathered_at_once(model, config),
            recomputed=largest_region(model, config),
        )


def measure_alone(trunk: str, ranks: int, shown: list[int]) -> list[Rank]:
    """Calls `measure` for several ranks, one after the other, each in a process of its own."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return list(pool.map(partial(measure, trunk, ranks), shown))


def gathered_bytes(model: nn.Module, config: RunConfig) -> Callable[[nn.Parameter], int]:
    """Returns the function from a parameter to the bytes of the whole tensor, gathered."""
    low = gathered_as(
        config.sharding.strategy, config.train.precision, compiled=config.train.compile
    )
    layers = model.low_precision_layers() if low else []  # type: ignore[operator]
    in_low = {p for layer in layers for p in layer.parameters(recurse=False)}
    return lambda p: p.numel() * (low.itemsize if low and p in in_low else FLOAT)


def units_of(model: nn.Module, config: RunConfig) -> Iterator[Unit]:
    """Lists the sharded units of a model in the order of `shard_units`, the rest last."""
    modules = model.units(config.sharding.unit_parameters)  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    parts, size = unit_parameters(model, modules), gathered_bytes(model, config)
    for module, part in zip([*modules, model], parts, strict=True):
        yield Unit(
            name=names[module] or "(the stem)",
            tensors=len(part),
            parameters=sum(parameter.numel() for parameter in part),
            here=sum(local(parameter.detach()).numel() for parameter in part),
            gathered=sum(size(parameter) for parameter in part),
        )


def gathered_at_once(model: nn.Module, config: RunConfig) -> int:
    """Largest bytes of whole weights on a rank at one time of a forward pass.

    A unit is whole from its start, or from the start of the unit that gathers it ahead, to its end.
    Outer units are whole during that time.
    """
    modules = model.units(config.sharding.unit_parameters)  # type: ignore[operator]
    parts, size = unit_parameters(model, modules), gathered_bytes(model, config)
    sizes = {
        module: sum(size(parameter) for parameter in part)
        for module, part in zip([*modules, model], parts, strict=True)
    }
    ahead = {
        module: modules[index + 1 : index + 1 + config.sharding.prefetch]
        for index, module in enumerate(modules)
    }
    whole: set[nn.Module] = set()
    most = 0

    def run(module: nn.Module) -> None:
        nonlocal most
        if module in sizes:
            whole.update([module, *ahead.get(module, [])])
            most = max(most, sum(sizes[each] for each in whole))
        for child in module.children():  # registered in the order of execution
            run(child)
        whole.discard(module)

    run(model)
    return most


def largest_region(model: nn.Module, config: RunConfig) -> int:
    """Bytes of the weights of the largest region of recomputed blocks, gathered.

    FSDP2 gathers all blocks of a region and frees each in its turn of the backward pass.
    """
    blocks, size = model.blocks(), gathered_bytes(model, config)  # type: ignore[operator]
    regions: list[Sequence[nn.Module]] = []
    if config.sharding.checkpoint_groups is None:
        regions = [[block] for stage in blocks for block in stage]
    else:
        for stage, ends in zip(blocks, config.sharding.checkpoint_groups, strict=True):
            bounds = [0, *sorted({min(end, len(stage)) for end in (*ends, len(stage))})]
            regions += [stage[a:b] for a, b in pairwise(bounds) if ends]
    return max(sum(size(p) for b in region for p in b.parameters()) for region in regions)


# ------------------------------------------------------------------------------- the tables


def unit_table(units: tuple[Unit, ...], rank: int) -> str:
    """Writes the wrapping plan as a table; neighbours of equal size share a row."""
    rows = []
    for _, run in groupby(units, key=lambda unit: (unit.parameters, unit.tensors)):
        first, *others = list(run)
        name = f"`{first.name}`" + (f" ... `{others[-1].name}`" if others else "")
        count = f"{1 + len(others)} x " if others else ""
        gib = f"{first.gathered / GIB:.3f}"
        here = f"{first.here * FLOAT / 2**20:.2f}"
        rows.append([name, f"{count}{first.tensors}", f"{first.parameters:,}", gib, here])
    head = ["unit", "tensors", "parameters", "GiB gathered", f"MiB on rank {rank}"]
    return record.markdown(head, rows)


def rank_table(ranks: list[Rank]) -> str:
    """Writes a table of each rank's GiB of float32, and the memory and seconds of building."""
    rows = []
    for each in ranks:
        kinds = [each.parameters, each.parameters, each.momentum, each.buffers]
        cells = [f"{number / GIB:.3f}" for number in [*kinds, sum(kinds), each.peak, each.imports]]
        rows.append([each.rank, *cells, f"{each.seconds:.0f}"])
    head = ["rank", "parameters", "gradients", "momentum", "buffers", "sum", "real memory"]
    return record.markdown([*head, "of it imports", "CPU s"], rows)


def describe(trunk: str, ranks: int, measured: list[Rank]) -> str:
    """Writes both tables and the text around them as Markdown."""
    first = measured[0]
    total = sum(unit.parameters for unit in first.units)
    largest = max(first.units, key=lambda unit: unit.parameters)
    layer = largest_layer(trunk)
    return (
        f"`{trunk}` with its head, {total:,} parameters ({total * FLOAT / GIB:.2f} GiB in "
        f"float32), over {ranks} ranks: {total * FLOAT / ranks / GIB:.3f} GiB each if they "
        "divided evenly.\n\n"
        f"{unit_table(first.units, first.rank)}\n"
        f"- The largest unit is `{largest.name}`, {largest.gathered / GIB:.2f} GiB.\n"
        f"- Weights gathered at once in a forward pass, units ahead included: at most "
        f"{first.gathered / GIB:.2f} GiB.\n"
        f"- The largest region that is recomputed has {first.recomputed / GIB:.2f} GiB of weights, "
        "and FSDP2 frees none of them before their turn in the backward pass comes.\n"
        f"- The largest layer, which ZeRO-3 holds whole while it fills it, has {layer:,} "
        f"parameters, {layer * FLOAT / GIB:.2f} GiB.\n\n"
        "GiB per rank. Gradients: once all of them exist (with `optim.fuse_backward` one unit's). "
        "Real memory: the process's peak while it was built, momentum included, without "
        "gradients.\n\n"
        f"{rank_table(measured)}"
    )


def largest_layer(trunk: str) -> int:
    """Parameters of the largest layer."""
    model = build.model_of(configuration(trunk), torch.device("meta"))
    own = (sum(p.numel() for p in layer.parameters(recurse=False)) for layer in model.modules())
    return max(own)


def main() -> int:
    """Prints the plan; returns 1 if a rank needed too much memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trunk", default=TRUNK, help="name in seer_scale.models.TRUNKS")
    parser.add_argument("--ranks", type=int, default=RANKS, help="ranks of the fake process group")
    parser.add_argument("--show", type=int, nargs="+", default=SHOWN, help="ranks to build")
    options = parser.parse_args()
    measured = measure_alone(options.trunk, options.ranks, list(options.show))
    text = describe(options.trunk, options.ranks, measured)
    print(text)
    if (options.trunk, options.ranks, tuple(options.show)) == (TRUNK, RANKS, SHOWN):
        path = record.save("rg10b_plan", COMMAND, {"ranks": [asdict(rank) for rank in measured]})
        record.put_into(ROOT / "docs" / "sharding.md", "rg10b-plan", text)
        print(f"\nkept in {path.relative_to(ROOT)} and docs/sharding.md")
    heavy = [rank.rank for rank in measured if rank.peak > LIMIT_GIB * GIB]
    if heavy:
        print(f"ranks {heavy} took more than {LIMIT_GIB} GiB to build", file=sys.stderr)
    return 1 if heavy else 0


if __name__ == "__main__":
    sys.exit(main())
