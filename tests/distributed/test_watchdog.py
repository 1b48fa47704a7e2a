"""A rank that does not come to a collective is named by those that wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from seer_scale.distributed.watchdog import Watchdog

Distributed = Callable[..., list[Any]]
TIMEOUT_S, BEAT_S = 2.0, 0.1


def hang(late: int, silent: bool) -> list[str]:
    """All ranks meet in a collective, except `late`, which is busy elsewhere, or stands still."""
    said: list[str] = []
    watchdog = Watchdog(TIMEOUT_S, said.append, BEAT_S)
    dist.barrier()
    watchdog.at(7, 0, "waiting for images")
    time.sleep(5 * BEAT_S)
    if dist.get_rank() == late:
        if silent:
            watchdog.close()
        time.sleep(2 * TIMEOUT_S + 20 * BEAT_S)
    else:
        watchdog.at(7, 1, "computing")
    dist.all_reduce(torch.ones(1))
    watchdog.close()
    return said


@pytest.mark.parametrize("silent", [False, True])
def test_the_missing_rank_is_named(distributed: Distributed, silent: bool) -> None:
    said = distributed(hang, 4, 2, silent)
    for rank in (0, 1, 3):
        (sentence,) = said[rank]
        assert f"rank {rank} has waited" in sentence
        assert "in step 7, computing; missing: rank 2 on " in sentence
        expected = "silent since" if silent else "still in"
        assert f"({expected} step 7, waiting for images); this rank is at" in sentence
        assert "rank 0 on" not in sentence
    assert len(said[2]) == (0 if silent else 1)


def slow_but_alive() -> list[str]:
    said: list[str] = []
    watchdog = Watchdog(TIMEOUT_S, said.append, BEAT_S)
    for step in range(20):
        watchdog.at(step, 0, "computing")
        time.sleep(2 * TIMEOUT_S / 20)
        dist.barrier()
    watchdog.close()
    time.sleep(2 * TIMEOUT_S)  # no longer watched
    return said


def test_progress_is_no_hang(distributed: Distributed) -> None:
    assert distributed(slow_but_alive, 2) == [[], []]


def test_one_process_has_nobody_to_wait_for() -> None:
    watchdog = Watchdog(0.01, lambda text: pytest.fail(text), 0.01)
    time.sleep(0.1)
    watchdog.close()
