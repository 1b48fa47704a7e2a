"""Processes that share a gloo group; a function runs on every rank at once."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from seer_scale.distributed.ports import free_port

# What the fixture `distributed` is: (function, world_size, *args) -> results by rank.
Distributed = Callable[..., list[Any]]
SECONDS = 180  # a rank that answers no sooner hangs in a collective

# Read by torch at import; more threads than cores make multi-process tests slower. What
# `make test-processors` sets holds for the ranks as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
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
        """Runs `function(*args)` on every rank; returns the results by rank.

        Raises:
            AssertionError: with the traceback of a rank that raised.
            TimeoutError: with the ranks that did not answer within `seconds`.
        """
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
            for rank in [rank for rank, pipe in enumerate(self.pipes) if pipe in ready]:
                good, value = self.pipes[rank].recv()
                if not good:  # the others may wait for it in a collective
                    raise AssertionError(f"rank {rank} raised:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        """Kills all ranks."""
        for process in self.processes:
            process.kill()
            process.join()
