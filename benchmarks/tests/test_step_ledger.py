"""The counts of the step's ledger: nobody makes them worse unseen. Lower them when they fall."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from benchmarks import step_ledger
from benchmarks.step_ledger import Cell, Way, cells, table
from harness.calls import Calls
from harness.fake_ranks import fake_ranks

RANKS = 64
# (strategy, way) -> at most so many calls into ATen and collectives of one step of the small model.
MOST: dict[tuple[str, Way], tuple[int, int]] = {
    ("ddp", "gpu"): (3114, 94),
    ("fsdp", "gpu"): (3574, 123),
    ("hsdp", "gpu"): (3574, 132),
    ("zero1", "cpu"): (4244, 54),
    ("zero2", "cpu"): (4244, 54),
    ("zero3", "cpu"): (6003, 61),
}


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "way"), MOST)
def test_a_step_makes_no_more_calls_than_before(strategy: str, way: Way) -> None:
    if way == "gpu" and torch.version.cuda is None:
        pytest.skip("asks for CUDA's kernels: CUDA's build")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        job = pool.submit(step_ledger.measure, "regnety_debug", strategy, RANKS, way)
        cell = job.result()
    assert cell.problem == ""
    found = (cell.aten, sum(cell.collectives.values()))
    most = MOST[strategy, way]
    assert found[0] <= most[0], (found, cell)
    assert found[1] <= most[1], (found, cell)
    assert found[0] > 0.8 * most[0], f"{found}: lower the numbers of this test"


# torch 2.14 has new names for two of them, torch 2.11 only these.
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_calls_and_bytes_are_counted() -> None:
    with fake_ranks(4, 0), Calls() as calls:
        one = torch.ones(8) + 1  # two calls
        dist.all_reduce(one)
        dist.all_gather_into_tensor(torch.empty(32), one)  # one call for the tensor
        dist.reduce_scatter_tensor(torch.empty(2), one)
    assert calls.aten == 4
    assert dict(calls.collectives) == {"allreduce": 1, "allgather": 1, "reduce_scatter": 1}
    assert dict(calls.bytes) == {"allreduce": 32, "allgather": 128, "reduce_scatter": 32}


def test_cells_that_are_not_possible_are_left_out() -> None:
    found = list(cells(["regnety_1_6gf", "seer_rg10b"], ["ddp", "zero3"], [2]))
    assert found == [
        ("regnety_1_6gf", "ddp", 2, "gpu"),
        ("regnety_1_6gf", "ddp", 2, "cpu"),
        ("regnety_1_6gf", "zero3", 2, "cpu"),
        ("seer_rg10b", "ddp", 2, "gpu"),
    ]


def test_the_table_says_what_failed() -> None:
    good = Cell("m", "fsdp", 2, "cpu", 1234, {"allgather": 3}, {"allgather": 5.0}, 0.25)
    bad = Cell("m", "zero3", 2, "cpu", problem="RuntimeError: no")
    lines = table([good, bad]).splitlines()
    assert lines[2] == "| `m` | fsdp | 2 | cpu | 1,234 | 0.25 | 3 allgather (5.0) |"
    assert lines[3].endswith("| RuntimeError: no |")
