"""What a step costs the host at 512 ranks: calls and collectives, which no machine changes.

With one group per tensor a step of this model under zero1 made 57,171 calls of functions at two
ranks and 980,446 at 512, and 8,225 and 83,539 calls into ATen.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import NamedTuple
from unittest.mock import patch

import pytest

from harness import engines
from harness.calls import Calls
from harness.fake_ranks import fake_ranks
from harness.host_time import HostCost, host_cost
from seer_scale.optim.slice_sgd import SliceSGD

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


class Update(NamedTuple):
    """What the engine's step asks of the host.

    Attributes:
        tensors: tensors of the model.
        steps: steps of the optimizer.
        aten: calls into ATen.
    """

    tensors: int
    steps: int
    aten: int


def updates(strategy: str) -> list[Update]:
    """Counts the third step of a small and a larger model, on rank 0 of two fake ranks."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    found = []
    with fake_ranks(FEW, 0):
        for trunk in ("regnety_debug", "regnety_200mf"):
            more = (*engines.STRATEGIES[strategy], *engines.TINY, f"model.trunk={trunk}")
            config = engines.configuration(*more)
            engine, _ = engines.build_engine(config)
            for _ in range(engines.WARM - 1):
                engines.forward_and_backward(engine, config)
                engine.step()
            engines.forward_and_backward(engine, config)
            counted = patch.object(SliceSGD, "step", autospec=True, side_effect=SliceSGD.step)
            with counted as steps, Calls() as calls:
                engine.step()
            tensors = len([*engine.model.parameters()])
            found.append(Update(tensors, steps.call_count, calls.aten))
    return found


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_all_tensors_are_updated_at_once(strategy: str) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        few, many = pool.submit(updates, strategy).result()
    assert few.steps == many.steps == 1
    # 20 under stages 1 and 2 and 25 under stage 3; with a step for each tensor 47 and 53.
    assert many.aten - few.aten < 30 * (many.tensors - few.tensors)
    assert many.tensors > 1.5 * few.tensors
