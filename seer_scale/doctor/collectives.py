"""Measures all-reduces of 64 MiB among real processes of this machine."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

from seer_scale.distributed.ports import free_port
from seer_scale.doctor.finding import Finding, below

FLOATS = 16 << 20  # 64 MiB, about a gradient bucket
ROUNDS = 4
# Bytes per second and rank over the bus below which a rank waits for gradients more than it works;
# NVLink has over 100 GB/s, PCIe 4 about 20, memory of one machine some.
LEAST = {"nccl": 8.0, "gloo": 0.3}


def check_collectives(timeout: float = 90.0) -> list[Finding]:
    """Times all-reduces among one process per GPU, or two processes on a CPU; imports torch.

    Args:
        timeout: seconds for all of it.
    """
    import torch

    gpus = torch.cuda.device_count()
    backend, ranks = ("nccl", gpus) if gpus else ("gloo", 2)
    name = f"{backend} all-reduce"
    seconds, problem = _measure(backend, ranks, timeout)
    if problem is not None or seconds is None:
        return [
            Finding(
                name,
                "fail",
                problem or "no rank answered",
                f"{ranks} processes of this machine cannot train together",
                "NCCL_DEBUG=INFO says more; a wrong NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, a "
                "firewall on the loopback device or a small /dev/shm are the usual reasons",
            )
        ]
    if ranks == 1:
        return [Finding(name, "ok", "1 rank", "there is nobody to exchange gradients with")]
    share = 2 * (ranks - 1) / ranks  # of the tensor that every rank sends
    speed = share * FLOATS * 4 / seconds / 1e9
    status = below(speed, fail=0, warn=LEAST[backend])
    return [
        Finding(
            name,
            status,
            f"{speed:.2f} GB/s per rank, {ranks} ranks",
            f"the gradients of a billion parameters take {share * 4 / speed:.2f} s",
            "" if status == "ok" else "is the machine busy, or peer access off?",
        )
    ]


def _measure(backend: str, ranks: int, timeout: float) -> tuple[float | None, str | None]:
    """Returns the seconds of one all-reduce on the slowest rank, or the error in words."""
    context, port = get_context("spawn"), free_port()
    deadline = time.monotonic() + timeout
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, ranks, backend, port, theirs))
        process.start()
        theirs.close()  # so that a rank that dies ends its pipe
        pipes.append(ours)
        processes.append(process)
    try:
        times: list[float] = []
        left = dict(zip(pipes, range(ranks), strict=True))
        while left:
            ready = wait(list(left), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                return None, f"ranks {sorted(left.values())} did not answer within {timeout:g} s"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = left.pop(pipe)
                try:
                    answer = pipe.recv()
                except EOFError:
                    return None, f"rank {rank} died"
                if isinstance(answer, str):
                    return None, f"rank {rank}: {answer}"
                times.append(answer)
        return max(times), None
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(rank: int, ranks: int, backend: str, port: int, pipe: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        import torch
        import torch.distributed as dist

        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
        values = torch.zeros(FLOATS, device=device)
        dist.all_reduce(values)  # connections are made by the first
        float(values[0])  # waits for the device
        began = time.perf_counter()
        for _ in range(ROUNDS):
            dist.all_reduce(values)
        float(values[0])
        pipe.send((time.perf_counter() - began) / ROUNDS)
    except Exception as error:  # whatever it is, it is the finding
        pipe.send(" ".join(str(error).split())[:200] or type(error).__name__)
