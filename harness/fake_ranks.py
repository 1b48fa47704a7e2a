"""Ranks that do not exist: torch's fake process group, whose collectives return at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_ranks(ranks: int, rank: int) -> Iterator[None]:
    """Inside, this process is one of so many that do not exist."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
