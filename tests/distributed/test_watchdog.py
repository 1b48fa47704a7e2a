"""A rank that does not come to a collective is named by those that wait for it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness.pool import Distributed
from seer_scale.distributed.ports import free_port
from seer_scale.distributed.watchdog import Watchdog
from seer_scale.errors import LOST_RANK_STATUS

TIMEOUT_S, BEAT_S = 2.0, 0.1


def hang(late: int, silent: bool, records: Path) -> list[str]:
    """All ranks meet in a collective, except `late`, which is busy elsewhere, or stands still."""
    said: list[str] = []
    watchdog = Watchdog(TIMEOUT_S, said.append, BEAT_S, records=records)
    dist.barrier()
    watchdog.at(7, 0, "waiting for images")
    time.sleep(5 * BEAT_S)
    if dist.get_rank() == late:
        if silent:
            watchdog.close()
        time.sleep(2 * TIMEOUT_S + 20 * BEAT_S)
    else:
        watchdog.at(7, 1, "computing")
    dist.all_reduce(torch.ones(3, 5))
    watchdog.close()
    return said


@pytest.mark.parametrize("silent", [False, True])
def test_the_missing_rank_is_named(distributed: Distributed, tmp_path: Path, silent: bool) -> None:
    (tmp_path / "file").touch()
    records = tmp_path / ("file" if silent else ".") / "records"
    said = distributed(hang, 4, 2, silent, records)
    for rank in (0, 1, 3):
        (sentence,) = said[rank]
        assert f"rank {rank} has waited" in sentence
        assert "in step 7, computing; missing: rank 2 on " in sentence
        expected = "silent since" if silent else "still in"
        assert f"({expected} step 7, waiting for images); collectives: " in sentence
        assert "; this rank is at " in sentence
        assert "rank 0 on" not in sentence
        # What three of four do is known from torch's own record, whose groups have numbers.
        assert re.search(
            r"ranks 0-1, 3 are in all_reduce \d+ of group 0 \(default_pg\) on \[3,5\]", sentence
        )
        after = r"rank 2 is in none, after barrier \d+ of group 0 \(default_pg\) on nothing"
        assert bool(re.search(after, sentence)) is not silent
        if silent:
            problem = f" is not written to {records} (Not a directory)"
            assert sentence.endswith(f"; the record of its collectives{problem}")
            continue
        assert sentence.endswith(f"; its last collectives are in {records}")
        record = json.loads((records / f"rank_{rank}.json").read_text())
        assert record["entries"][-1]["input_sizes"] == [[3, 5]]
        assert not record["entries"][-1]["retired"]
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


def test_one_rank_that_stands_still_is_ended() -> None:
    said: list[str] = []
    watchdog = Watchdog(TIMEOUT_S, said.append, BEAT_S)
    watchdog.at(19, 0, "waiting for images")
    deadline = time.monotonic() + 60
    while not said and time.monotonic() < deadline:
        time.sleep(BEAT_S)
    watchdog.close()
    (sentence,) = said
    assert sentence.startswith("rank 0 has waited ")
    assert " s in step 19, waiting for images; this rank is at test_watchdog.py:" in sentence


def stand(ranks_late: tuple[int, ...], seen: int) -> tuple[list[str], list[str]]:
    """After `seen` short phases of each kind the ranks given take 3 s for one, and come back."""
    said: list[str] = []
    ended: list[str] = []
    watchdog = Watchdog(1000.0, ended.append, 0.05, warn=said.append, margin_s=0.2)
    dist.barrier()
    for step in range(seen):
        watchdog.at(step, 0, "waiting for images")
        time.sleep(0.01)
        watchdog.at(step, 1, "computing")
        dist.all_reduce(torch.ones(1))
    watchdog.at(seen, 0, "waiting for images")
    if dist.get_rank() in ranks_late:
        time.sleep(3.0)
    watchdog.at(seen, 1, "computing")
    dist.all_reduce(torch.ones(2, 4))
    watchdog.at(seen + 1, 0, "waiting for images")
    watchdog.close()
    return said, ended


@pytest.mark.parametrize(("late", "speaks", "named"), [(1, 0, "rank 1 on "), (0, 1, "rank 0 on ")])
def test_an_unusually_long_phase_is_a_warning_of_one_rank(
    distributed: Distributed, late: int, speaks: int, named: str
) -> None:
    found = distributed(stand, 3, (late,), 20)
    assert [ended for _, ended in found] == [[], [], []]
    (sentence,) = found[speaks][0]
    assert f"rank {speaks} has waited " in sentence
    assert f"missing: {named}" in sentence
    assert "(still in step 20, waiting for images); collectives: " in sentence
    assert "in all_reduce " in sentence
    assert "; this phase usually takes " in sentence
    assert "; the run waits, at most 1000 s (run.hang_minutes), or less if all" in sentence
    # The late rank 0 itself is slow too, and says so about itself; nobody else does.
    others = [said for rank, (said, _) in enumerate(found) if rank not in (speaks, 0)]
    assert all(said == [] for said in others)


def test_what_has_not_been_seen_often_is_not_unusual(distributed: Distributed) -> None:
    assert distributed(stand, 2, (1,), 4) == [([], []), ([], [])]


RANKS_ONLY = frozenset({"computing"})


def learning(end: Callable[[str], None] | None, records: Path | None = None) -> Watchdog:
    """A watchdog that learns a limit of about a second and has seen ten steps."""
    watchdog = Watchdog(
        1000.0,
        end,
        0.05,
        records=records,
        warn=lambda _: None,
        margin_s=0.2,
        ranks_only=RANKS_ONLY,
    )
    for step in range(10):
        watchdog.at(step, 0, "waiting for images")
        time.sleep(0.01)
        watchdog.at(step, 1, "computing")
        time.sleep(0.01)
    watchdog.at(10, 0, "waiting for images")
    return watchdog


def stand_for_ever() -> list[str]:
    """All ranks stand in a phase that waits for ranks only, each until it would have ended."""
    said: list[str] = []
    watchdog = learning(said.append)
    watchdog.at(10, 1, "computing")
    dist.barrier()
    if dist.get_rank() < 2:  # the others are in a collective that these never join
        wait_for(said)
        dist.all_reduce(torch.ones(1))
    else:
        dist.all_reduce(torch.ones(1))
        wait_for(said)
    watchdog.close()
    return said


def wait_for(said: list[str]) -> None:
    deadline = time.monotonic() + 60
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)


def test_where_every_rank_is_stuck_a_run_ends_at_a_learned_limit(distributed: Distributed) -> None:
    said = distributed(stand_for_ever, 3)
    for rank, sentences in enumerate(said):
        (sentence,) = sentences
        assert f"rank {rank} has waited " in sentence
        assert " s in step 10, computing; missing: " in sentence
        assert "; collectives: " in sentence
        assert "; this phase usually takes " in sentence


def come_back(late: int, seconds: float) -> list[str]:
    """One rank waits for images for longer than any limit, then computes as the others do."""
    said: list[str] = []
    watchdog = learning(said.append)
    dist.barrier()
    if dist.get_rank() == late:
        time.sleep(4.0)
    watchdog.at(10, 1, "computing")
    if dist.get_rank() == late:
        time.sleep(seconds)
    dist.all_reduce(torch.ones(1))
    watchdog.at(11, 0, "waiting for images")
    watchdog.close()
    return said


@pytest.mark.parametrize("late", [0, 2])
def test_a_disk_that_comes_back_ends_no_run(distributed: Distributed, late: int) -> None:
    assert distributed(come_back, 3, late, 0.7) == [[], [], []]


def test_nothing_is_learned_from_a_few_steps() -> None:
    said: list[str] = []
    watchdog = Watchdog(1000.0, said.append, 0.05, margin_s=0.1, ranks_only=RANKS_ONLY)
    for step in range(5):  # the last of them is not over
        watchdog.at(step, 1, "computing")
        time.sleep(0.01)
    time.sleep(3.0)
    watchdog.close()
    assert said == []


def test_one_rank_ends_at_its_learned_limit() -> None:
    said: list[str] = []
    watchdog = learning(said.append)
    watchdog.at(10, 1, "computing")
    wait_for(said)
    watchdog.close()
    (sentence,) = said
    assert " in step 10, computing; this rank is at test_watchdog.py:" in sentence
    assert re.search(r"; this phase usually takes [0-9.]+ s$", sentence)


def stand_alone(rank: int, port: int, records: Path) -> None:
    """A rank of a group whose store lives in rank 0, as under `deepspeed`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=4)
    watchdog = learning(None, records)
    dist.barrier()
    watchdog.at(10, 1, "computing")
    time.sleep(120)


def test_all_ranks_end_alike_where_the_store_ends_with_rank_0(tmp_path: Path) -> None:
    context = get_context("spawn")
    port = free_port()
    ranks = [
        context.Process(target=stand_alone, args=(rank, port, tmp_path / "records"))
        for rank in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
    assert [rank.exitcode for rank in ranks] == [LOST_RANK_STATUS] * 4
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [
        f"rank_{rank}.json" for rank in range(4)
    ]


def stopped(said: Any) -> None:
    watchdog = learning(said.put)
    watchdog.at(10, 1, "computing")
    said.put("computing")
    time.sleep(0.3)
    watchdog.at(11, 0, "waiting for images")
    time.sleep(120)


def test_a_process_that_was_stopped_has_not_waited() -> None:
    context = get_context("spawn")
    said = context.Queue()
    process = context.Process(target=stopped, args=(said,))
    process.start()
    assert said.get(timeout=60) == "computing"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3.0)  # more than twice the limit
    os.kill(process.pid, signal.SIGCONT)
    with pytest.raises(Empty):
        said.get(timeout=2)
    process.kill()
    process.join()
