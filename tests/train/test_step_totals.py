"""What ranks tell each other at the end of a step: means, work, and who was asked for what."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from seer_scale import distributed as ranks
from seer_scale.train.step_totals import StepTotals, Totals
from seer_scale.train.stopping import Stop, StopSignals

Distributed = Callable[..., list[Any]]
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


@pytest.mark.parametrize(
    ("number", "wish"),
    [(signal.SIGINT, Stop.DONE), (signal.SIGTERM, Stop.REQUEUE), (signal.SIGUSR1, Stop.REQUEUE)],
)
def test_a_signal_is_remembered_and_handlers_are_given_back(number: int, wish: Stop) -> None:
    before = signal.getsignal(number)
    signals = StopSignals()
    try:
        assert signals.wish is Stop.NO
        os.kill(os.getpid(), number)
        assert signals.wish is wish
    finally:
        signals.close()
    assert signal.getsignal(number) is before
