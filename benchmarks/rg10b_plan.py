"""RG-10B on 64 ranks without one of them: what is gathered together, what each rank holds.

Some ranks are built for real, each in a process of its own, by the project's own `shard()` on
torch's fake process group, which has any number of ranks and talks to none. What is printed is read
off their tensors.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, pairwise
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clone works without installing the package

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from benchmarks import record  # noqa: E402
from harness.resident import resident_bytes  # noqa: E402
from seer_scale.config import RunConfig  # noqa: E402
from seer_scale.config.recipe import parse  # noqa: E402
from seer_scale.models import seeded_values  # noqa: E402
from seer_scale.optim.slices import local  # noqa: E402
from seer_scale.parallel.engine import Engine, shard  # noqa: E402
from seer_scale.parallel.fsdp import unit_parameters  # noqa: E402
from seer_scale.train import build  # noqa: E402

COMMAND = "make rg10b-plan"
TRUNK, RANKS, SHOWN = "rg_10b", 64, (0, 1, 31, 63)
LIMIT_GIB = 2.0  # of real memory, for building one rank
GIB = 2**30
FLOAT = 4


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together, without those of units inside it.

    Attributes:
        name: of the module.
        tensors: their number.
        parameters: elements of the whole tensors.
        here: elements that the rank holds.
    """

    name: str
    tensors: int
    parameters: int
    here: int


@dataclass(frozen=True)
class Rank:
    """One rank as built, in bytes.

    Attributes:
        rank: its number.
        parameters: its slices of the weights; those of the gradient are as large once all exist.
        momentum: its slices of that.
        buffers: of BatchNorm, which every rank holds whole.
        imports: real memory of the process before anything was built.
        peak: most real memory of the process.
        seconds: of CPU for building, initial values included.
        units: the wrapping plan.
        gathered: bytes of whole weights at one time of a forward pass, at most.
        recomputed: bytes of whole weights of the largest region that is recomputed.
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
    """RG-10B's recipe under strategy fsdp, with another trunk if that is wanted."""
    arguments = ["--recipe", "seer_rg10b", f"model.trunk={trunk}", "sharding.strategy=fsdp", *more]
    return parse(arguments, recipes=ROOT / "launch" / "recipes").config


@contextmanager
def fake_ranks(ranks: int, rank: int) -> Iterator[None]:
    """Inside, this process is one of so many that do not exist."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_engine(config: RunConfig) -> Engine:
    """What a training builds on this rank, on the CPU: its slices with their initial values."""
    source = partial(seeded_values, seed=config.run.seed)
    return shard(partial(build.model_of, config), source, config, None, torch.device("cpu"))


def measure(trunk: str, ranks: int, rank: int) -> Rank:
    """Builds a rank with its momentum; call it in a fresh process, whose peak memory it reads."""
    imports = resident_bytes("VmHWM")
    config = configuration(trunk)
    with fake_ranks(ranks, rank):
        began = time.process_time()
        engine = build_engine(config)
        momentum = sum(part.momentum.numel() for part in engine.slices())  # made when first seen
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
            gathered=FLOAT * gathered_at_once(model, config),
            recomputed=FLOAT * largest_region(model.blocks(), config),  # type: ignore[operator]
        )


def measure_alone(trunk: str, ranks: int, shown: list[int]) -> list[Rank]:
    """`measure` of several ranks, one after the other and each in a process of its own."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return list(pool.map(partial(measure, trunk, ranks), shown))


def units_of(model: nn.Module, config: RunConfig) -> Iterator[Unit]:
    """The sharded units of a model, in the order that `shard_units` got them, the rest last."""
    modules = model.units(config.sharding.unit_parameters)  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    parts = unit_parameters(model, modules)
    for module, part in zip([*modules, model], parts, strict=True):
        yield Unit(
            name=names[module] or "(the stem)",
            tensors=len(part),
            parameters=sum(parameter.numel() for parameter in part),
            here=sum(local(parameter.detach()).numel() for parameter in part),
        )


def gathered_at_once(model: nn.Module, config: RunConfig) -> int:
    """Most parameters that are whole on a rank at one time of a forward pass.

    A unit is whole from its start, or from the start of the unit that gathers it ahead, to its end,
    and the units around it are whole meanwhile.
    """
    modules = model.units(config.sharding.unit_parameters)  # type: ignore[operator]
    parts = unit_parameters(model, modules)
    sizes = {
        module: sum(parameter.numel() for parameter in part)
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
        for child in module.children():  # blocks and their layers are registered as they run
            run(child)
        whole.discard(module)

    run(model)
    return most


def largest_region(blocks: Sequence[Sequence[nn.Module]], config: RunConfig) -> int:
    """Parameters of the blocks that are recomputed as one region: FSDP2 gathers them and frees none
    before its turn in the backward pass comes.
    """
    regions: list[Sequence[nn.Module]] = []
    if config.sharding.checkpoint_groups is None:
        regions = [[block] for stage in blocks for block in stage]
    else:
        for stage, ends in zip(blocks, config.sharding.checkpoint_groups, strict=True):
            bounds = [0, *sorted({min(end, len(stage)) for end in (*ends, len(stage))})]
            regions += [stage[a:b] for a, b in pairwise(bounds) if ends]
    return max(sum(p.numel() for b in region for p in b.parameters()) for region in regions)


# ------------------------------------------------------------------------------- the tables


def unit_table(units: tuple[Unit, ...], rank: int) -> str:
    """The wrapping plan; neighbours of equal size share a row."""
    rows = []
    for _, run in groupby(units, key=lambda unit: (unit.parameters, unit.tensors)):
        first, *others = list(run)
        name = f"`{first.name}`" + (f" ... `{others[-1].name}`" if others else "")
        count = f"{1 + len(others)} x " if others else ""
        gib = f"{first.parameters * FLOAT / GIB:.3f}"
        here = f"{first.here * FLOAT / 2**20:.2f}"
        rows.append([name, f"{count}{first.tensors}", f"{first.parameters:,}", gib, here])
    head = ["unit", "tensors", "parameters", "GiB gathered", f"MiB on rank {rank}"]
    return record.markdown(head, rows)


def rank_table(ranks: list[Rank]) -> str:
    """GiB of float32 on each rank, and what building it took."""
    rows = []
    for each in ranks:
        kinds = [each.parameters, each.parameters, each.momentum, each.buffers]
        cells = [f"{number / GIB:.3f}" for number in [*kinds, sum(kinds), each.peak, each.imports]]
        rows.append([each.rank, *cells, f"{each.seconds:.0f}"])
    head = ["rank", "parameters", "gradients", "momentum", "buffers", "sum", "real memory"]
    return record.markdown([*head, "of it imports", "CPU s"], rows)


def describe(trunk: str, ranks: int, measured: list[Rank]) -> str:
    """Both tables and the facts beside them, as Markdown."""
    first = measured[0]
    total = sum(unit.parameters for unit in first.units)
    largest = max(first.units, key=lambda unit: unit.parameters)
    layer = largest_layer(trunk)
    return (
        f"`{trunk}` with its head, {total:,} parameters ({total * FLOAT / GIB:.2f} GiB in "
        f"float32), over {ranks} ranks: {total * FLOAT / ranks / GIB:.3f} GiB each if they "
        "divided evenly.\n\n"
        f"{unit_table(first.units, first.rank)}\n"
        f"- The largest unit is `{largest.name}`, {largest.parameters * FLOAT / GIB:.2f} GiB.\n"
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
    """Parameters of the largest module that has any itself."""
    model = build.model_of(configuration(trunk), torch.device("meta"))
    own = (sum(p.numel() for p in layer.parameters(recurse=False)) for layer in model.modules())
    return max(own)


def main() -> int:
    """Prints the plan; status 1 if a rank took more memory than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trunk", default=TRUNK, help="of seer_scale.models.TRUNKS")
    parser.add_argument("--ranks", type=int, default=RANKS, help="of the fake process group")
    parser.add_argument("--show", type=int, nargs="+", default=SHOWN, help="the ranks to build")
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
