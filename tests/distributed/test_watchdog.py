"""A rank that does not come to a collective is named by those that wait for it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from harness.pool import Distributed
from seer_scale.distributed.watchdog import Watchdog

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
    assert "; the run waits, at most 1000 s (run.hang_minutes)" in sentence
    # The late rank 0 itself is slow too, and says so about itself; nobody else does.
    others = [said for rank, (said, _) in enumerate(found) if rank not in (speaks, 0)]
    assert all(said == [] for said in others)


def test_what_has_not_been_seen_often_is_not_unusual(distributed: Distributed) -> None:
    assert distributed(stand, 2, (1,), 4) == [([], []), ([], [])]


RANKS_ONLY = frozenset({"computing"})


def stand_for_ever(late: int, doing: str, seen: int, seconds: float) -> list[str]:
    """After `seen` short phases rank `late` stands in `doing`, and the others wait for it."""
    said: list[str] = []
    watchdog = Watchdog(
        1000.0, said.append, 0.05, warn=lambda _: None, margin_s=0.2, ranks_only=RANKS_ONLY
    )
    dist.barrier()
    for step in range(seen):
        watchdog.at(step, 0, "waiting for images")
        time.sleep(0.01)
        watchdog.at(step, 1, "computing")
        dist.all_reduce(torch.ones(1))
    watchdog.at(seen, 0, "waiting for images")
    if dist.get_rank() != late or doing == "computing":
        watchdog.at(seen, 1, "computing")
    if dist.get_rank() == late:
        deadline = time.monotonic() + seconds
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
    dist.all_reduce(torch.ones(1))
    time.sleep(2.0)  # for what the others still look at
    watchdog.close()
    return said


@pytest.mark.parametrize("late", [0, 2])
def test_where_nothing_comes_back_a_run_ends_at_a_learned_limit(
    distributed: Distributed, late: int
) -> None:
    said = distributed(stand_for_ever, 3, late, "computing", 20, 60.0)
    for rank, sentences in enumerate(said):
        (sentence,) = sentences
        assert f"rank {rank} has waited " in sentence
        assert "; collectives: " in sentence
        assert f"rank {late} is in none" in sentence
        assert "; this phase usually takes " in sentence


@pytest.mark.parametrize(
    ("doing", "seen"), [("waiting for images", 20), ("computing", 4)], ids=["a disk", "unseen"]
)
def test_what_may_come_back_or_is_new_has_the_limit_of_the_key(
    distributed: Distributed, doing: str, seen: int
) -> None:
    assert distributed(stand_for_ever, 3, 2, doing, seen, 5.0) == [[], [], []]


def test_one_rank_ends_at_its_learned_limit() -> None:
    said: list[str] = []
    watchdog = Watchdog(
        1000.0, said.append, 0.05, warn=lambda _: None, margin_s=0.1, ranks_only=RANKS_ONLY
    )
    for step in range(10):
        watchdog.at(step, 1, "computing")
        time.sleep(0.01)
    deadline = time.monotonic() + 60
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)
    watchdog.close()
    (sentence,) = said
    assert " in step 9, computing; this rank is at test_watchdog.py:" in sentence
    assert "; this phase usually takes 0.0" in sentence
