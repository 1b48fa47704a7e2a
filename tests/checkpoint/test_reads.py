"""What a resume opens and reads: one rank's share, on fake groups of 512 and on real ranks."""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterable
from io import DEFAULT_BUFFER_SIZE
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from harness.engines import build_engine
from harness.fake_ranks import fake_ranks
from harness.fake_state import configuration
from harness.pool import Distributed
from harness.reads import CPU, META, Reads, opened, read_so_far, resume_reads, write_sparse
from seer_scale import distributed as ranks
from seer_scale.checkpoint import CheckpointReader
from seer_scale.checkpoint.manifest import rank_file
from seer_scale.checkpoint.placement import SLICES, Part, join_reports, read_joined
from seer_scale.optim import filling
from seer_scale.optim.filling import fill_together
from seer_scale.optim.slices import Slice
from seer_scale.train import build
from seer_scale.train.restore import restore

# ------------------------------------------------------------------------------- the index


def reports_of(cuts: dict[str, list[int]]) -> list[dict[str, list[object]]]:
    """Reports of ranks that hold so many elements of each tensor, one after the other."""
    reports: list[dict[str, list[object]]] = []
    for rank in range(max(map(len, cuts.values()))):
        mine: dict[str, list[object]] = {}
        for name, lengths in cuts.items():
            if rank < len(lengths) and lengths[rank]:
                offset = sum(lengths[:rank])
                first = ["F32", [sum(lengths)], True] if offset == 0 else []
                mine[name] = [offset, lengths[rank], *first]
        reports.append(mine)
    return reports


def test_the_index_finds_every_element_where_it_lies() -> None:
    rng = random.Random(0)
    cuts = {
        "equal": [3] * 7,
        "last shorter": [4, 4, 4, 2],
        "rank 0 alone": [9],
        "none on the first": [0, 0, 5, 5, 1],
        "gaps in the ranks": [2, 0, 2, 0, 2],
        **{f"any {n}": [rng.randrange(4) for _ in range(7)] + [1] for n in range(5)},
    }
    text = join_reports(reports_of(cuts))
    assert text is not None
    assert json.loads(text)["equal"] == ["F32", [21], True, [[0, 7, 3]]]  # as short as it can be
    rows = read_joined(text.encode(), 8)
    for name, lengths in cuts.items():
        holders = [rank for rank, length in enumerate(lengths) for _ in range(length)]
        assert rows[name].problem() is None
        for low in range(len(holders)):
            for high in range(low + 1, len(holders) + 1):
                expected = [
                    Part(rank, sum(lengths[:rank]), lengths[rank])
                    for rank in sorted(set(holders[low:high]))
                ]
                assert list(rows[name].parts(low, high)) == expected, (name, low, high)


def test_slices_out_of_rank_order_or_missing_have_no_index() -> None:
    first = ["F32", [8], True]
    assert join_reports([{"a": [0, 4, *first]}, {"a": [4, 4]}])
    assert join_reports([{"a": [4, 4]}, {"a": [0, 4, *first]}]) is None
    assert join_reports([{"a": [0, 4, *first]}, {}]) is None
    assert join_reports([{"a": [0, 4, *first]}, {"a": [2, 4]}]) is None


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero"])
def test_index_and_headers_say_the_same(tmp_path: Path, strategy: str) -> None:
    config = configuration("fsdp", 1, "regnety_debug")
    folder = tmp_path / "step_00000007"
    write_sparse(folder, build.model_of(config, META), strategy, 5)
    with opened(folder) as opens:
        indexed = CheckpointReader(folder)
    assert opens == {"manifest.json": 1, SLICES: 1}
    manifest = {**indexed.manifest, "files": {}}
    with opened(folder) as opens:
        plain = CheckpointReader(folder, manifest)
    assert opens == {rank_file(folder, rank).name: 1 for rank in range(5)}
    assert indexed.kinds == plain.kinds
    for name, kind in indexed.kinds.items():
        assert indexed.has_momentum(name) == plain.has_momentum(name)
        low, high = kind.numel // 3, max(kind.numel // 2, 1)
        assert [*indexed._rows[name].parts(low, high)] == [*plain._rows[name].parts(low, high)]


# ------------------------------------------------------------------------------- whole tensors

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (), "none": (0,), "one": (1,), "few": (2,), "some": (7, 3), "many": (40, 5, 2),
}  # fmt: skip


def fill_on_ranks(bucket: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Fills tensors of several types and layouts; returns them, and the elements asked for."""
    asked = dict.fromkeys(SHAPES, 0)

    def values(name: str, start: int, stop: int) -> Tensor:
        asked[name] += stop - start
        return torch.arange(start, stop).float() + len(name)

    tensors = {
        name: torch.full(shape, -1.0 if name != "scalar" else -1, dtype=None)
        for name, shape in SHAPES.items()
    }
    tensors["scalar"] = torch.tensor(-1)  # int64, as the counter of a BatchNorm
    tensors["some"] = torch.full((3, 7), -1.0).t()  # not contiguous
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "BUCKET_BYTES", bucket)
        fill_together(tensors.items(), values)
    return tensors, asked


@pytest.mark.parametrize("bucket", [16, 100, 1 << 20])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_gets_all_and_reads_its_share(
    distributed: Distributed, world_size: int, bucket: int
) -> None:
    found = [fill_on_ranks(bucket)] if world_size == 1 else distributed(
        fill_on_ranks, world_size, bucket
    )  # fmt: skip
    for tensors, asked in found:
        for name, shape in SHAPES.items():
            expected = torch.arange(math.prod(shape)).float() + len(name)
            assert torch.equal(tensors[name].float(), expected.view(shape)), name
            assert asked[name] <= -(-math.prod(shape) // world_size), name
    for name, shape in SHAPES.items():
        assert sum(asked[name] for _, asked in found) == math.prod(shape)


# ------------------------------------------------------------------------------- counts


def overhead(folder: Path, rank: int, others: Iterable[str] = ()) -> int:
    """Bytes beside the numbers: manifest, index, and headers of the files that a rank opens."""
    own, first = rank_file(folder, rank).name, rank_file(folder, 0).name
    found = sum((folder / name).stat().st_size for name in ("manifest.json", SLICES))
    for name in (own, own, first, *others):  # its own for the checksum too
        content = (folder / name).read_bytes()
        found += min(8 + int.from_bytes(content[:8], "little") + DEFAULT_BUFFER_SIZE, len(content))
    return found


def resume(folder: Path, strategy: str, trunk: str, world: int, rank: int) -> Reads:
    """One rank's resume in a process of its own: DeepSpeed remembers the first group."""
    warm = configuration(strategy, 8, "regnety_debug")
    case = (folder, configuration(strategy, 8, trunk), world, rank, warm)
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(resume_reads, case)


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "saved"),
    [("fsdp", "fsdp"), ("zero3", "zero"), ("zero1", "zero_joined"), ("zero2", "zero_joined")],
)
def test_a_rank_of_512_opens_its_own_file_and_that_of_the_buffers(
    tmp_path: Path, strategy: str, saved: str
) -> None:
    folder = tmp_path / "step_00000007"
    model = build.model_of(configuration(strategy, 8, "regnety_debug"), META)
    write_sparse(folder, model, saved, 512)
    found = resume(folder, strategy, "regnety_debug", 512, 1)
    # Its own: checksum, header, numbers. That of rank 0: header, numbers.
    own, first = rank_file(folder, 1).name, rank_file(folder, 0).name
    others = found.opens - Counter({"manifest.json": 1, SLICES: 1, own: 3, first: 2})
    assert (found.opens.total(), found.opens[own]) == (7 + others.total(), 3)
    # Whole weights of tensors that were joined, then cut: its share of each lies elsewhere.
    assert len(others) <= (len([*model.parameters()]) if saved == "zero_joined" else 0)
    assert set(others.values()) <= {2}
    assert found.bytes <= 2 * found.kept + overhead(folder, 1, others) + 50_000  # Python's files


@pytest.mark.slow
def test_a_rank_of_512_reads_at_most_twice_what_it_keeps_of_ten_billion_parameters(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "step_00000007"
    write_sparse(folder, build.model_of(configuration("fsdp", 8, "rg_10b"), META), "fsdp", 512)
    found = resume(folder, "fsdp", "rg_10b", 512, 1)
    assert found.kept > 140 << 20
    assert found.bytes <= 2 * found.kept
    assert found.opens.total() == 7


@pytest.mark.parametrize("saved", ["fsdp", "zero", "ddp"])
def test_replicas_read_a_checkpoint_once_together(tmp_path: Path, saved: str) -> None:
    """As under ddp: all weights and momenta, of which each of 512 ranks asks for a share."""
    folder = tmp_path / "step_00000007"
    model = build.model_of(configuration("ddp", 1, "regnety_debug"), META)
    write_sparse(folder, model, saved, 512)
    asked = 0
    with fake_ranks(512, 1), opened(folder) as opens:
        reader = CheckpointReader(folder, part=1, parts=512)
        whole = model.to_empty(device=CPU)
        values = reader.values(whole)

        def counted(name: str, start: int, stop: int) -> Tensor:
            nonlocal asked
            asked += stop - start
            return values(name, start, stop)

        filling.fill(whole, counted)
        reader.close()
    tensors = [*whole.parameters(), *whole.buffers()]
    assert asked <= sum(tensor.numel() for tensor in tensors) / 512 + len(tensors)
    # Rows cut in 512 parts are not where elements cut in 512 parts are, but near.
    assert len(opens) <= 2 + {"fsdp": 12, "zero": 2, "ddp": 1}[saved]
    assert opens.total() <= 2 * len(opens)


@pytest.mark.parametrize("holds_all", [True, False])
def test_restore_reads_momenta_of_replicas_together(tmp_path: Path, holds_all: bool) -> None:
    """An engine whose slices are whole tensors; only if all ranks have them do they share."""
    folder = tmp_path / "step_00000007"
    model = build.model_of(configuration("ddp", 1, "regnety_debug"), META)
    write_sparse(folder, model, "ddp", 64)
    slices = [
        Slice(name, tuple(p.shape), 0, torch.zeros(p.numel()), torch.ones(p.numel()))
        for name, p in model.named_parameters()
    ]
    engine: Any = SimpleNamespace(slices=lambda: iter(slices), holds_all=holds_all, loss_scale=None)
    with fake_ranks(64, 1):
        reader, before = CheckpointReader(folder), read_so_far()
        restore(reader, engine, cast(Any, object()), CPU, "none")
        read = read_so_far() - before
    whole = sum(held.momentum.nbytes for held in slices)
    assert (read < whole / 8 + 2 * overhead(folder, 0)) if holds_all else (read > whole)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero0"])
def test_only_engines_of_replicas_hold_all(strategy: str) -> None:
    config = configuration(strategy, 1, "regnety_debug")
    os.environ.setdefault("LOCAL_RANK", "0")
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(holds_all_of, (config,)) == (strategy != "fsdp")


def holds_all_of(config: Any) -> bool:
    with fake_ranks(1, 0):
        return build_engine(config)[0].holds_all


@pytest.mark.parametrize("world", [48, 64, 80])
def test_another_number_of_ranks_opens_few_files(tmp_path: Path, world: int) -> None:
    """A rank's own slices under ZeRO, cut for another number of ranks than saved them."""
    folder = tmp_path / "step_00000007"
    model = build.model_of(configuration("ddp", 1, "regnety_debug"), META)
    write_sparse(folder, model, "zero", 64)
    with opened(folder) as opens:
        reader = CheckpointReader(folder)
        for name, parameter in model.named_parameters():
            share = -(-parameter.numel() // world)
            low, high = (min(times * share, parameter.numel()) for times in (5, 6))
            assert len(reader.read(name, low, high - low, "momentum")) == high - low
        reader.close()
    # Of 64: tensors of few elements lie in files of their own.
    assert len(opens) <= 2 + (1 if world == 64 else 8)
    assert opens.total() == 2 + 2 * (len(opens) - 2)


def states_on_ranks(folder: Path) -> tuple[list[list[int]], dict[str, int]]:
    with opened(folder) as opens:
        reader = CheckpointReader(folder)
        states = reader.local_states()
        reader.close()
    assert ranks.world_size() == 2
    return [state["rng.cpu"][:4].tolist() for state in states], dict(opens)


@pytest.mark.long
def test_ranks_share_the_states_of_other_ranks(distributed: Distributed, tmp_path: Path) -> None:
    folder = tmp_path / "step_00000007"
    write_sparse(folder, build.model_of(configuration("ddp", 1, "regnety_debug"), META), "fsdp", 5)
    one, two = distributed(states_on_ranks, 2, folder)
    assert one[0] == two[0]
    assert len(one[0]) == 5
    names = [{name for name in found if name.startswith("rank_")} for _, found in (one, two)]
    shares = ((0, 2, 4), (1, 3))
    assert names == [{rank_file(folder, rank).name for rank in share} for share in shares]
