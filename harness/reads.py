"""Counts what one of many ranks opens and reads when it resumes a model of any size, and writes.

The files of a resume are real and as large as the model's. Their numbers are holes, which take no
disk.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from harness import engines
from harness.fake_ranks import fake_ranks
from seer_scale.checkpoint import CheckpointReader
from seer_scale.checkpoint.manifest import rank_file, write_manifest
from seer_scale.checkpoint.placement import MOMENTUM, SLICES, WEIGHT, join_reports, reported
from seer_scale.checkpoint.rank_files import write_rank_file
from seer_scale.checkpoint.reader import verify_together
from seer_scale.checkpoint.staging import Staging, stage
from seer_scale.config.ds_config import ds_config_of
from seer_scale.objectives import Objective
from seer_scale.optim.groups import MOST_JOINED, join, parameter_groups
from seer_scale.optim.parts import parts_of
from seer_scale.parallel.engine import Engine
from seer_scale.storage.tensor_file import Kind, Stamp, lay_out, stamp
from seer_scale.train import build
from seer_scale.train.build_engine import engine_of
from seer_scale.train.restore import restore

CPU, META = torch.device("cpu"), torch.device("meta")
LOCAL = {"local/rng.cpu": Kind(torch.uint8, (5056,))}


class Reads(NamedTuple):
    """What a rank did to files below a folder.

    Attributes:
        opens: opens by path below the folder.
        bytes: bytes that the process read, of any file.
        kept: bytes that the rank holds afterwards: weights, momenta, buffers and its own state.
    """

    opens: Counter[str]
    bytes: int
    kept: int


class Writes(NamedTuple):
    """What a rank did to files below a folder, when it wrote its part of a checkpoint.

    Attributes:
        opens: opens by path below the folder.
        bytes: bytes that the process wrote, to any file.
    """

    opens: Counter[str]
    bytes: int


_watched: list[tuple[Path, Counter[str]]] = []
_hooked: list[bool] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | os.PathLike):
        for folder, opens in _watched:
            path = Path(arguments[0])
            if path.is_relative_to(folder):
                opens[str(path.relative_to(folder))] += 1


@contextmanager
def opened(folder: Path) -> Iterator[Counter[str]]:
    """Counts the opens of files below a folder, by path; a hook of Python stays for good."""
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked.append(True)
    opens: Counter[str] = Counter()
    _watched.append((folder, opens))
    try:
        yield opens
    finally:
        _watched.pop()


def read_so_far() -> int:
    """Bytes that system calls of this process have read, from files or the page cache."""
    return _so_far("rchar")


def _so_far(counter: str) -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)[counter])


def cut(shape: Sequence[int], strategy: str, ranks: int, rank: int) -> tuple[int, int]:
    """Offset and length of a rank's slice of a tensor: rows under fsdp, elements under ZeRO."""
    numel = math.prod(shape)
    if strategy == "fsdp":
        row = numel // shape[0]
        share = -(-shape[0] // ranks) * row
    else:
        share = numel if strategy == "ddp" else -(-numel // ranks)
    low, high = min(rank * share, numel), min(rank * share + share, numel)
    return low, high - low


def cut_joined(
    groups: Sequence[dict[str, Any]], ranks: int, rank: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, offset and length of a rank's slices under ZeRO 1 and 2, which cut joined tensors.

    DeepSpeed fills a group up, so that every rank has the same even number of elements.
    """
    for group in groups:
        numel = sum(parameter.numel() for parameter in group["params"])
        held = torch.empty(2 * -(-numel // (2 * ranks)), device=META)
        for part in parts_of(group, held, rank, ranks):
            yield part.tensor["name"], (part.offset, part.length)


def write_sparse(folder: Path, model: nn.Module, strategy: str, ranks: int) -> None:
    """Writes what a save of so many ranks leaves behind, with holes for numbers, without a trunk.

    Checksums are those of rank 0, 1 and the last one; the others are not true.

    Args:
        folder: of the checkpoint; its name gives the step 7.
        model: on meta.
        strategy: ddp, fsdp, zero (stage 3) or zero_joined (stages 1 and 2).
        ranks: number of ranks that saved.
    """
    folder.mkdir(parents=True)
    joined = []
    if strategy == "zero_joined":
        alone = parameter_groups(model, unit_rows=frozenset())
        joined = join(alone, most=MOST_JOINED, cut_first=False)
    files: dict[str, Stamp] = {}
    reports = []
    for rank in range(ranks):
        placement: dict[str, Any] = {}
        kinds: dict[str, Kind] = dict(LOCAL)
        slices = dict(cut_joined(joined, ranks, rank))
        for name, parameter in model.named_parameters():
            offset, length = slices.get(name) or cut(parameter.shape, strategy, ranks, rank)
            if length:
                kinds |= {p + name: Kind(torch.float32, (length,)) for p in (WEIGHT, MOMENTUM)}
                placement[name] = {"shape": list(parameter.shape), "offset": offset}
        if rank == 0:
            for name, buffer in model.named_buffers():
                kinds[WEIGHT + name] = Kind(buffer.dtype, (buffer.numel(),))
                placement[name] = {"shape": list(buffer.shape), "offset": 0}
        header, begins, size = lay_out(kinds, {"placement": json.dumps(placement)})
        path = rank_file(folder, rank)
        with path.open("wb") as file:
            file.write(header)
            file.truncate(size)
            file.seek(begins["local/rng.cpu"])  # the generator takes no zeros
            file.write(torch.get_rng_state().numpy().tobytes())
        true = rank in (0, 1, ranks - 1)
        files[path.name] = stamp(path) if true else Stamp(size, "0" * 32)
        reports.append(reported(placement, kinds))
    index = join_reports(reports)
    assert index is not None
    (folder / SLICES).write_text(index)
    files[SLICES] = stamp(folder / SLICES)
    state: dict[str, Any] = {
        "step": 7,
        "samples_seen": 7,
        "best_loss": 1.0,
        "collection": None,
        "losses": [],
    }
    write_manifest(folder, {"step": 7, "world_size": ranks, "trunk": "any", "state": state}, files)


class _NoState:
    """An objective without a state of its own."""


def resume_reads(folder: Path, config: Any, ranks: int, rank: int, warm: Any) -> Reads:
    """Resumes one of so many ranks from a checkpoint of `write_sparse`, with its real engine.

    Other ranks do not exist, so that what is gathered is wrong; what is read is right. A process
    can do this for one `zero` strategy only: DeepSpeed remembers its first group.

    Args:
        folder: of the checkpoint.
        config: of the run that resumes.
        ranks: number of its ranks.
        rank: the one that exists.
        warm: of an engine that is built before anything is counted, for what it imports.
    """
    with fake_ranks(ranks, rank):
        return _resumed(folder, config, ranks, rank, warm)[1]


def reads_and_writes(
    folder: Path, config: Any, ranks: int, rank: int, warm: Any
) -> tuple[Reads, Writes]:
    """Resumes as `resume_reads` does, then writes the rank's part of the next checkpoint."""
    partial = folder.with_name(".step_00000008.partial")
    partial.mkdir()
    with fake_ranks(ranks, rank):
        engine, reads = _resumed(folder, config, ranks, rank, warm)
        staging, local = Staging(), {"rng.cpu": torch.get_rng_state()}
        placement = stage(staging, engine.slices(), engine.model, local, in_place=True)
        with opened(partial) as opens:
            before = _so_far("wchar")
            write_rank_file(partial, placement, staging)
            return reads, Writes(opens, _so_far("wchar") - before)


def _resumed(folder: Path, config: Any, ranks: int, rank: int, warm: Any) -> tuple[Engine, Reads]:
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    model = build.model_of(config, META)
    ds_config = ds_config_of(config, ranks)
    with opened(folder) as opens:
        engine_of(warm, engines.ones, ds_config_of(warm, ranks), CPU)
        before = read_so_far()
        # As `first_whole` does, which would wait for what rank 0 sends.
        reader = CheckpointReader(folder, part=rank, parts=ranks)
        assert verify_together(reader) is None
        engine = engine_of(config, reader.values, ds_config, CPU, model=lambda _: model)
        objective: Objective = _NoState()  # type: ignore[assignment]
        restore(reader, engine, objective, CPU, "none")
        read = read_so_far() - before
    kept = sum(b.nbytes for b in engine.model.buffers()) + LOCAL["local/rng.cpu"].bytes
    kept += sum(part.values.nbytes + part.momentum.nbytes for part in engine.slices())
    return engine, Reads(opens, read, kept)
