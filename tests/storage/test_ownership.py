"""One process at a time owns a path; who has ended without a word is found out, locks or not."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness.locks import RULES, environment_with
from harness.owners import OWN, own_elsewhere
from seer_scale.errors import UserError
from seer_scale.storage import ownership
from seer_scale.storage.locks import lock
from seer_scale.storage.ownership import Claim, exclusive, living_owner, owned

FORK = multiprocessing.get_context("fork")  # others would import torch first


def mark_of(path: Path) -> Path:
    (mark,) = (path / ".owner").iterdir()
    return mark


def of_another_machine(path: Path, seconds_ago: float = 0.0) -> Path:
    """The mark of an owner that this machine cannot see, last touched some time ago."""
    claim = Claim(path)
    assert claim.take() is None
    mark = mark_of(path)
    text = mark.read_text()
    claim.release()
    mark.parent.mkdir(parents=True)
    mark.write_text(json.dumps(json.loads(text) | {"machine": "another", "host": "node7"}))
    os.utime(mark, (time.time() - seconds_ago,) * 2)
    return mark


@pytest.mark.parametrize("rule", ["", *RULES])
def test_the_second_is_told_who_the_first_is_and_follows_a_dead_one(
    tmp_path: Path, rule: str
) -> None:
    path = tmp_path / "run"
    with own_elsewhere(path, rule) as first:
        sentence = rf"run.dir=x is in use by process {first.pid} on \S+ "
        with pytest.raises(UserError, match=sentence), owned(path, "run.dir=x"):
            pass
        assert (owner := living_owner(path)) is not None
        assert owner.pid == first.pid
        first.kill()
    assert living_owner(path) is None
    with owned(path, "run.dir=x"):
        assert json.loads(mark_of(path).read_text())["pid"] == os.getpid()
    assert not (path / ".owner").exists()
    with owned(tmp_path / "new", "run.dir=x"):
        pass
    assert not (tmp_path / "new").exists()  # nothing was written, so nothing stays


def test_no_locks_are_a_warning(tmp_path: Path) -> None:
    with own_elsewhere(tmp_path / "run", "none") as first:
        first.terminate()
        assert first.stderr is not None
        (line,) = first.stderr.read().splitlines()
    assert line.startswith(f"warning: the file system of {tmp_path}/run has no locks: ")


def compete(path: Path, beside: bool, together: Any, winner: Any) -> None:
    claim = Claim(path, beside=beside)
    together.wait()
    if claim.take() is None:
        with winner.get_lock():
            winner.value = os.getpid() if winner.value == 0 else -1
    together.wait()
    os._exit(0)  # as if killed: the mark stays


@pytest.mark.parametrize("beside", [False, True])
def test_of_many_that_start_at_once_one_wins(tmp_path: Path, beside: bool) -> None:
    """First where nobody was, then behind an owner that is dead, again and again."""
    for _ in range(5):
        together, winner = FORK.Barrier(8), FORK.Value("i", 0)
        given = (tmp_path / "out", beside, together, winner)
        children = [FORK.Process(target=compete, args=given) for _ in range(8)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert winner.value in {child.pid for child in children}


def test_whoever_judged_the_dead_owner_before_another_took_over_loses(tmp_path: Path) -> None:
    """The second claim looks, the first takes over and ends, a third begins: then it goes on."""
    with own_elsewhere(tmp_path) as dead:
        dead.kill()
    late, third = Claim(tmp_path), Claim(tmp_path)
    judge = late._judge

    def interrupted(number: int) -> ownership.Found:
        found = judge(number)
        late._judge = judge  # type: ignore[method-assign]
        with owned(tmp_path, "run.dir=x"):
            pass
        assert third.take() is None
        return found

    late._judge = interrupted  # type: ignore[method-assign]
    met = late.take()
    assert met is not None
    assert met.lives
    assert met.owner.pid == os.getpid()
    assert living_owner(tmp_path) is not None  # the third is still there
    third.release()


def test_a_process_that_has_the_dead_owner_s_number_is_not_the_owner(tmp_path: Path) -> None:
    claim = Claim(tmp_path)
    assert claim.take() is None
    mark = mark_of(tmp_path)
    text = mark.read_text()
    claim.release()
    mark.parent.mkdir()
    mark.write_text(json.dumps(json.loads(text) | {"started": 1}))
    with owned(tmp_path, "run.dir=x"):
        pass


def test_an_owner_elsewhere_lives_if_its_mark_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However old the mark looks: clocks of two machines differ."""
    monkeypatch.setattr(ownership, "BEAT_S", 60.0)
    mark = of_another_machine(tmp_path, seconds_ago=7200)
    claim = Claim(tmp_path)
    met = claim.take()
    assert met is not None
    assert met.lives is None
    os.utime(mark, (time.time() - 7195,) * 2)
    met = claim.take()
    assert met is not None
    assert met.lives
    assert "on node7" in str(met.owner)


@pytest.mark.parametrize(("seconds_ago", "silent"), [(7200, 1e6), (-7200, 0.5)])
def test_an_owner_elsewhere_that_gives_no_sign_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds_ago: float, silent: float
) -> None:
    """After two beats if its mark is old too, after a time in any case."""
    monkeypatch.setattr(ownership, "BEAT_S", 0.1)
    monkeypatch.setattr(ownership, "SILENT_S", min(silent, 3600))
    of_another_machine(tmp_path, seconds_ago)
    said: list[str] = []
    with owned(tmp_path, "run.dir=x", say=said.append):
        assert json.loads(mark_of(tmp_path).read_text())["pid"] == os.getpid()
    assert len(said) == 1
    assert "run.dir=x was last used by process" in said[0]


@pytest.mark.parametrize(("quiet", "sentences"), [(60.0, 0), (0.0, 1)])
def test_a_mark_that_is_being_written_is_not_worth_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: float, sentences: int
) -> None:
    """An owner makes its mark and writes it a moment later; another may look between the two."""
    monkeypatch.setattr(ownership, "BEAT_S", 0.1)
    monkeypatch.setattr(ownership, "SILENT_S", 1.0)
    monkeypatch.setattr(ownership, "_QUIET_S", quiet)
    (tmp_path / ".owner").mkdir()
    (tmp_path / ".owner" / "00001").touch()
    said: list[str] = []
    with owned(tmp_path, "run.dir=x", say=said.append):
        assert json.loads(mark_of(tmp_path).read_text())["pid"] == os.getpid()
    assert len(said) == sentences
    assert all("last used by a process whose mark is empty: waiting" in text for text in said)


def test_a_mark_that_came_after_the_look_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two look at the same moment and find no mark; the second to make one sees the first's."""
    with own_elsewhere(tmp_path) as first:
        seen, really = [[]], ownership._numbers  # type: ignore[var-annotated]
        monkeypatch.setattr(
            ownership, "_numbers", lambda marks: seen.pop() if seen else really(marks)
        )
        met = Claim(tmp_path).take()
        assert met is not None
        assert (met.owner.pid, met.lives) == (first.pid, True)
    assert not seen


def test_an_owner_touches_its_mark_and_learns_that_it_was_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    told: list[str] = []
    claim = Claim(tmp_path, lost=told.append)
    assert claim.take() is None
    mark = mark_of(tmp_path)
    os.utime(mark, (0, 0))
    deadline = time.monotonic() + 60
    while mark.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mark.stat().st_mtime > 0
    mark.with_name("00002").write_text("{}")
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(told) == 1
    assert "was taken over by another process" in told[0]
    claim.release()


def test_a_process_that_inherited_the_mark_is_an_owner(tmp_path: Path) -> None:
    """A study that was killed while its run lives on."""
    code = OWN.replace('"run.dir=x"', '"study", inherited=True').replace(
        "time.sleep(300)",
        "import subprocess\n"
        "    child = subprocess.Popen(['sleep', '300'], close_fds=False)\n"
        "    print(child.pid, flush=True); time.sleep(300)",
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as study:
        assert study.stdout is not None
        assert study.stdout.readline() == "mine\n"
        child = int(study.stdout.readline())
        study.kill()
        study.wait()
        assert living_owner(tmp_path) is not None
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while living_owner(tmp_path) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


TALLY = """
import sys, time
from pathlib import Path
from seer_scale.storage.ownership import exclusive
count = Path(sys.argv[1])
for _ in range(20):
    with exclusive(count.with_name("lock")):
        value = int(count.read_text())
        time.sleep(0.002)
        count.write_text(str(value + 1))
"""


@pytest.mark.parametrize("rule", ["", *RULES])
def test_an_exclusive_block_runs_in_one_process_at_a_time(tmp_path: Path, rule: str) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    command = [sys.executable, "-c", TALLY, str(count)]
    children = [subprocess.Popen(command, env=environment_with(rule)) for _ in range(3)]
    assert [child.wait(120) for child in children] == [0, 0, 0]
    assert count.read_text() == "60"


def test_a_lock_tells_held_from_missing(tmp_path: Path) -> None:
    with (tmp_path / "file").open("a+b") as one, (tmp_path / "file").open("a+b") as other:
        assert lock(one, shared=True) is True
        assert lock(other, shared=True) is True
        assert lock(other) is False
        one.close()
        assert lock(other) is True
    with exclusive(tmp_path / "file"), (tmp_path / "file").open("rb") as other:
        assert lock(other, shared=True) is False
