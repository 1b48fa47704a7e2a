"""What a step costs the host at 512 ranks: calls and collectives, which no machine changes.

With one group per tensor a step of this model under zero1 made 57,171 calls of functions at two
ranks and 980,446 at 512, and 8,225 and 83,539 calls into ATen.
"""

from __future__ import annotations

from functools import cache

import pytest

from harness.host_time import HostCost, host_cost

FEW, MANY = 2, 512


@cache
def cost(strategy: str, ranks: int) -> HostCost:
    return host_cost(strategy, ranks, "regnety_debug", steps=1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "aten", "python"),  # per rank beyond the first: a cut of a joined group
    [("zero1", 3, 60), ("zero2", 3, 60), ("zero3", 3, 10)],
)
def test_ranks_cost_the_host_next_to_nothing(strategy: str, aten: int, python: int) -> None:
    few, many = cost(strategy, FEW), cost(strategy, MANY)
    assert many.collectives == few.collectives
    assert many.aten < few.aten + aten * MANY
    assert many.python < few.python * 1.1 + python * MANY


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_weights_are_gathered_and_gradients_reduced_at_once(strategy: str) -> None:
    found = cost(strategy, MANY)
    # The largest two are the model's gradients and weights; the others are BatchNorm's, SwAV's and
    # the optimizer's sums.
    assert found.collectives["allgather"] == 1
    assert found.bytes["allreduce"] < 1.1 * found.bytes["allgather"]
