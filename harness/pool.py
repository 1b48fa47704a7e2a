"""Shared fixtures: a pool of gloo processes in which a function runs on every rank at once."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

from seer_scale.distributed.ports import free_port

SECONDS = 180  # a rank that answers no sooner hangs in a collective
SLOW_SECONDS = 1500  # in tests marked slow

# Read by torch at import; more threads than cores make multi-process tests slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """`world_size` processes that share a gloo group and wait for work."""

    def __init__(self, world_size: int) -> None:
        context = get_context("spawn")
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs))
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while len(results) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = sorted(set(range(len(self.pipes))) - results.keys())
                raise TimeoutError(f"ranks {silent} did not answer within {seconds} s")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                good, value = pipe.recv()
                if not good:  # the others may wait for it in a collective
                    raise AssertionError(f"rank {rank} raised:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[int, Pool]]:
    pools: dict[int, Pool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def distributed(
    _pools: dict[int, Pool], request: pytest.FixtureRequest
) -> Callable[..., list[Any]]:
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
