"""Totals of a step that ranks exchange: means, work, and wishes to stop or refresh."""

from __future__ import annotations

import pytest
import torch

from harness.pool import Distributed
from seer_scale import distributed as ranks
from seer_scale.train.step_totals import StepTotals, Totals
from seer_scale.train.stopping import Stop

CPU = torch.device("cpu")


def totals(stops: list[Stop], refreshing: int) -> Totals:
    rank = ranks.rank()
    sums = StepTotals(CPU, 2)
    for micro in range(2):
        sums.add({"loss": torch.tensor(float(10 * rank + micro)), "constant": 3.0})
    assert float(sums["loss"]) == 20 * rank + 1
    return sums.over_ranks(
        torch.tensor(0.1, dtype=torch.float64),
        bad=rank,
        worked=rank + 0.5,
        stop=stops[rank],
        refresh=rank == refreshing,
    )


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        ([Stop.NO, Stop.NO], Stop.NO),
        ([Stop.DONE, Stop.NO], Stop.DONE),
        ([Stop.DONE, Stop.REQUEUE], Stop.REQUEUE),
    ],
)
def test_they_are_the_same_on_every_rank(
    distributed: Distributed, stops: list[Stop], expected: Stop
) -> None:
    one, other = distributed(totals, 2, stops, 1)
    assert one == other
    assert one.means == {"loss": 5.5, "constant": 3.0}  # of 0, 1, 10 and 11
    assert (one.bad, one.work, one.stop, one.refresh) == (1, [0.5, 1.5], expected, True)
    assert one.grad_norm == 0.1  # nothing of its float64 is lost on the way
