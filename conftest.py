"""The fixture `distributed`: a function of a test runs on every rank of a pool of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from harness.pool import SECONDS, Distributed, Pool

SLOW_SECONDS = 1500  # that ranks may take to answer in tests marked slow


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[int, Pool]]:
    pools: dict[int, Pool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def distributed(_pools: dict[int, Pool], request: pytest.FixtureRequest) -> Distributed:
    """`distributed(function, world_size, *args)` -> what the function returned on each rank."""
    seconds = SLOW_SECONDS if request.node.get_closest_marker("slow") else SECONDS

    def run(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        pool = _pools.get(world_size) or _pools.setdefault(world_size, Pool(world_size))
        try:
            return pool.run(function, *args, seconds=seconds)
        except BaseException:
            # The other ranks may wait in a collective that will never end.
            _pools.pop(world_size).close()
            raise

    return run
