"""The first rank that fails is the one that every other rank names."""

from __future__ import annotations

import torch.distributed as dist

from harness.pool import Distributed
from seer_scale.distributed import failure


def marks_in_turn() -> str | None:
    """Fails on the last rank first, then on the others; returns what each rank is told."""
    last = dist.get_world_size() - 1
    told = failure.mark() if dist.get_rank() == last else None
    dist.barrier()
    if dist.get_rank() != last:
        told = failure.mark()
    dist.barrier()
    dist.distributed_c10d._get_default_store().delete_key(failure.MARK)
    dist.barrier()
    return told


def test_the_first_rank_that_fails_is_named_by_the_others(distributed: Distributed) -> None:
    assert distributed(marks_in_turn, 3) == ["rank 2", "rank 2", None]


def test_one_process_names_nobody() -> None:
    assert failure.mark() is None
