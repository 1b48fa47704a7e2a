"""Timeouts of all process groups of a run, under every strategy."""

from __future__ import annotations

import os
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

MINUTES = 77.0  # no default of torch or DeepSpeed


def timeouts(port: int, strategies: list[str]) -> dict[str, list[float]]:
    """Minutes of all groups that each strategy leaves on this rank, in a world of its own."""
    from torch.distributed import distributed_c10d

    found: dict[str, list[float]] = {}
    for number, name in enumerate(strategies):
        dist.destroy_process_group()
        _groups.cache_clear()  # of the world that is gone
        os.environ.update(MASTER_PORT=str(port + number), LOCAL_WORLD_SIZE="4")
        distributed.init(MINUTES)
        more = ("sharding.sync_bn_group_size=2", *STRATEGIES[name])
        build_engine(parse(arguments("unused", "unused", *more), recipes=RECIPES, ranks=1).config)
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
        # DeepSpeed does not take a second world in one process.
        *[pytest.param([f"zero{stage}"], marks=pytest.mark.long) for stage in range(4)],
    ],
    ids="+".join,
)
def test_every_group_of_a_run_has_the_timeout_of_the_run(strategies: list[str]) -> None:
    pool = Pool(4)
    try:
        ranks = pool.run(timeouts, free_port(), strategies)
    finally:
        pool.close()
    for found in ranks:
        for name, minutes in found.items():
            # The world, a BatchNorm group of two; hsdp's mesh has two more.
            assert len(minutes) >= (4 if name == "hsdp" else 2), name
            assert set(minutes) == {MINUTES}, name
