"""The counts of the step's ledger: nobody makes them worse unseen. Lower them when they fall."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from benchmarks import ledger_files, step_ledger
from benchmarks.ledger_files import FileCell
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
    ("zero3", "cpu"): (5319, 55),
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


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_save_and_a_resume_open_no_more_files_than_before(strategy: str) -> None:
    wanted = [("regnety_debug", strategy, RANKS)]
    (cell,) = step_ledger.alone(step_ledger.measure_save_and_resume, wanted, FileCell)
    assert cell.problem == ""
    # The part, its folder for fsync, the report and its folder; see test_reads.py for the seven.
    assert (cell.save[0], cell.resume[0]) == (4, 7)
    assert cell.kept <= cell.save[1] <= cell.kept + 0.1  # the header and the report
    assert cell.resume[1] <= 2 * cell.kept + 0.2  # manifest, index and two headers


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
    good = Cell(
        "m", "fsdp", 2, "cpu", 1234, {"allgather": 3}, {"allgather": 5.0}, (0.1, 0.25, 0.05)
    )
    bad = Cell("m", "zero3", 2, "cpu", problem="RuntimeError: no")
    lines = table([good, bad]).splitlines()
    assert lines[2] == "| `m` | fsdp | 2 | cpu | 1,234 | 0.10 + 0.25 + 0.05 | 3 allgather (5.0) |"
    assert lines[3].endswith("| RuntimeError: no |")


def test_the_table_of_files_says_what_failed() -> None:
    good = FileCell("m", "fsdp", 2, 100.0, (4, 101.0), (7, 150.0))
    bad = FileCell("m", "ddp", 2, problem="a rank keeps 9 GiB: not measured")
    lines = ledger_files.table([good, bad]).splitlines()
    assert lines[2] == "| `m` | fsdp | 2 | 100.0 | 4 | 101.0 | 7 | 150.0 | 1.50 |"
    assert lines[3].startswith("| `m` | ddp | 2 | a rank keeps 9 GiB: not measured |")


def test_a_rank_that_keeps_too_much_is_named_and_not_built() -> None:
    wanted = [("seer_rg10b", "fsdp", 2)]
    (cell,) = step_ledger.alone(step_ledger.measure_save_and_resume, wanted, FileCell)
    assert cell.problem == "a rank keeps 36 GiB: not measured"


def killed(*_: object) -> FileCell:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_cell_whose_process_is_killed_does_not_take_the_others_along() -> None:
    found = list(step_ledger.alone(killed, [("m", "fsdp", 2), ("m", "fsdp", 4)], FileCell))
    assert [cell.ranks for cell in found] == [2, 4]
    assert all("was killed" in cell.problem for cell in found)
