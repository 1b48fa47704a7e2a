"""Processes and what passes between them: collectives, the watchdog, marks of failed ranks."""

from seer_scale.distributed.collectives import (
    all_gather,
    all_gather_with_gradient,
    all_reduce,
    barrier,
    broadcast_object,
    gather_lists,
    init,
    is_main,
    local_rank,
    local_world_size,
    nodes,
    physical_cores,
    rank,
    shutdown,
    threads_of_a_rank,
    world_size,
)

__all__ = [
    "all_gather",
    "all_gather_with_gradient",
    "all_reduce",
    "barrier",
    "broadcast_object",
    "gather_lists",
    "init",
    "is_main",
    "local_rank",
    "local_world_size",
    "nodes",
    "physical_cores",
    "rank",
    "shutdown",
    "threads_of_a_rank",
    "world_size",
]
