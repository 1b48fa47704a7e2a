"""What a step costs the host of one rank among many: seconds, calls and collectives.

The ranks are fake (`fake_ranks`), so that a laptop can tell what Python does at 512 ranks. The
crops are tiny: what is left of a step is its host time.

    python -m harness.host_time zero2 512
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from harness import engines
from harness.calls import Calls
from harness.fake_ranks import fake_ranks
from seer_scale.config.ds_config import ds_config_of
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.train.build_engine import engine_of


@dataclass
class HostCost:
    """Costs of one step on one rank.

    Attributes:
        forward: CPU seconds of the forward pass, the smallest of the steps.
        backward: CPU seconds of the backward pass, with the reduction of gradients.
        step: CPU seconds of the optimizer's step, with what is gathered after it.
        python: calls of functions, in Python and from Python, of all three.
        aten: calls into ATen.
        collectives, bytes: see `calls.Calls`.
    """

    forward: float = 0.0
    backward: float = 0.0
    step: float = 0.0
    python: int = 0
    aten: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


def host_cost(strategy: str, ranks: int, trunk: str, *, steps: int = 3) -> HostCost:
    """Measures rank 0 of so many, in a process of its own: DeepSpeed remembers its first group.

    Args:
        strategy: a key of `engines.STRATEGIES`.
        ranks: number of ranks, all but one of which do not exist.
        trunk: name of a trunk; its weights have to fit this machine.
        steps: steps that are timed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_host_cost, strategy, ranks, trunk, steps).result()


def _host_cost(strategy: str, ranks: int, trunk: str, steps: int) -> HostCost:
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    torch.set_num_threads(1)
    config = engines.configuration(
        *engines.STRATEGIES[strategy], *engines.TINY, f"model.trunk={trunk}"
    )
    cost = HostCost()
    with fake_ranks(ranks, 0):
        engine = engine_of(config, engines.ones, ds_config_of(config, ranks), engines.CPU)
        apply_schedule(engine.param_groups, lr=0.0)
        for _ in range(engines.WARM):
            timed_micro_batch(engine, config)
        timed = [timed_micro_batch(engine, config) for _ in range(steps)]
        cost.forward, cost.backward, cost.step = (min(part) for part in zip(*timed, strict=True))
        with Calls() as calls:
            timed_micro_batch(engine, config)
        cost.aten, cost.collectives, cost.bytes = calls.aten, calls.collectives, calls.bytes
        cost.python = _python_calls(lambda: timed_micro_batch(engine, config))
    return cost


def timed_micro_batch(
    engine: Any, config: Any, device: torch.device = engines.CPU
) -> tuple[float, float, float]:
    """Runs a micro-batch; CPU seconds of forward pass, backward pass and the engine's step."""
    stamps = [time.process_time()]
    engines.forward_and_backward(
        engine, config, device=device, before_backward=lambda: stamps.append(time.process_time())
    )
    stamps.append(time.process_time())
    engine.step()
    stamps.append(time.process_time())
    return stamps[1] - stamps[0], stamps[2] - stamps[1], stamps[3] - stamps[2]


def _python_calls(run: Any) -> int:
    count = 0

    def profile(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


if __name__ == "__main__":
    trunk = sys.argv[3] if len(sys.argv) > 3 else "regnety_1_6gf"
    print(_host_cost(sys.argv[1], int(sys.argv[2]), trunk, 3))
