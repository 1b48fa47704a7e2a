"""Timeouts of all process groups of a run, under every strategy."""

from __future__ import annotations

import os
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from harness.engines import STRATEGIES, build_engine
from harness.jobs import RECIPES, arguments
from harness.pool import Pool
from seer_scale import distributed
from seer_scale.config.recipe import parse
from seer_scale.distributed.ports import free_port
from seer_scale.parallel.convert_batchnorm import _groups
from tests.parallel.test_fairscale import one_stream
from tests.train.runs import ZERO

MINUTES = 77.0  # no default of torch or DeepSpeed
# The world and a BatchNorm group of two; beside them those of hsdp's mesh, of FairScale, and one of
# DeepSpeed.
LEAST = {"ddp": 2, "fsdp": 2, "hsdp": 4, "fairscale": 4}
WAYS = {**STRATEGIES, **ZERO, "fairscale": ("sharding.strategy=fairscale",)}


def timeouts(port: int, strategies: list[str]) -> dict[str, list[float]]:
    """Minutes of all groups that each strategy leaves on this rank, in a world of its own."""
    from torch.distributed import distributed_c10d

    found: dict[str, list[float]] = {}
    for number, name in enumerate(strategies):
        dist.destroy_process_group()
        _groups.cache_clear()  # of the world that is gone
        os.environ["MASTER_PORT"] = str(port + number)
        distributed.init(MINUTES)
        more = ("sharding.sync_bn_group_size=2", *WAYS[name])
        config = parse(arguments("unused", "unused", *more), recipes=RECIPES, ranks=1).config
        with one_stream() if name == "fairscale" else nullcontext():
            build_engine(config)
        found[name] = []
        for group in distributed_c10d._world.pg_map:
            options = group._get_backend(torch.device("cpu")).options
            found[name].append(options._timeout / timedelta(minutes=1))
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    "strategies",
    [
        ["ddp", "fsdp", "hsdp"],
        # DeepSpeed and FairScale do not take a second world in one process.
        *[[name] for name in (*ZERO, "fairscale")],
    ],
    ids="+".join,
)
def test_every_group_of_a_run_has_the_timeout_of_the_run(strategies: list[str]) -> None:
    if "fairscale" in strategies:
        pytest.importorskip("fairscale")
    pool = Pool(4 if "hsdp" in strategies else 2)
    try:
        ranks = pool.run(timeouts, free_port(), strategies)
    finally:
        pool.close()
    for found in ranks:
        for name, minutes in found.items():
            assert len(minutes) >= LEAST.get(name, 3), name
            assert set(minutes) == {MINUTES}, name
