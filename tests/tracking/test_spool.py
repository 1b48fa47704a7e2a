"""The training process's side: what is written, how fast, and that nothing there can raise."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.locks import RULES, environment_with
from seer_scale.tracking import NullTracker, Tracker
from seer_scale.tracking.lock import SenderLock, holder, is_written
from seer_scale.tracking.spool import RETRY_S, SPOOL, read_events, write_json


def events(tracker: Tracker, offset: int = 0) -> list[dict[str, Any]]:
    return [event.fields for event in read_events(tracker.folder / SPOOL, offset)]


def test_every_verb_is_one_readable_line(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run")
    tracker.start("name")
    tracker.log_params({"lr": 0.1, "uri": "http://u:p@host"})
    metrics: dict[str, Any] = {"loss": torch.tensor(2.5), "norm": np.float32(0.5), "n": 3}
    tracker.log_metrics(metrics, 7)
    tracker.log_artifact(tmp_path / "run" / "curve.png", "plots")
    tracker.log_artifact("/elsewhere/file")
    with pytest.warns(UserWarning, match="may be gone before it is sent"):
        tracker.log_model(
            tmp_path / "run" / "a" / "trunk", step=7, tags={"loss": 2.5}, aliases=["best"]
        )
    tracker.set_tags({"x": 1})
    tracker.finish("FAILED")
    written = events(tracker)
    assert [event["kind"] for event in written] == [
        "start",
        "params",
        "metrics",
        "artifact",
        "artifact",
        "model",
        "tags",
        "finish",
    ]
    assert written[1]["params"] == {"lr": "0.1", "uri": "http://host"}
    assert written[2]["metrics"] == {"loss": 2.5, "norm": 0.5, "n": 3.0}
    assert abs(written[2]["time"] - time.time() * 1000) < 60_000
    assert written[3]["path"] == "curve.png"
    assert written[4]["path"] == "/elsewhere/file"
    assert written[5]["path"] == "a/trunk"
    assert written[7]["status"] == "FAILED"


def test_values_that_are_not_finite_survive(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log_metrics({"a": float("nan"), "b": float("inf"), "c": float("-inf")}, 0)
    values = events(tracker)[0]["metrics"]
    assert math.isnan(values["a"])
    assert (values["b"], values["c"]) == (float("inf"), float("-inf"))


@pytest.mark.parametrize("more", [0, 10_000])  # shorter and longer than what is read at a time
def test_a_line_being_written_waits_and_a_killed_one_costs_only_itself(
    tmp_path: Path, more: int
) -> None:
    tracker = Tracker(tmp_path)
    tracker.log_metrics({"loss": 1.0}, 0)
    spool = tracker.folder / SPOOL
    with spool.open("ab") as file:
        file.write(b'{"kind": "metrics", "ste' + b"p" * more)
    assert len(events(tracker)) == 1
    resumed = Tracker(tmp_path)
    resumed.log_metrics({"loss": 2.0}, 1)
    found = list(read_events(spool, 0))
    assert [event.fields["step"] for event in found] == [0, 1]
    assert found[-1].end == spool.stat().st_size
    assert events(tracker, found[0].end) == [found[1].fields]


def test_a_damaged_line_costs_only_itself(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log_metrics({"loss": 1.0}, 0)
    spool = tracker.folder / SPOOL
    with spool.open("ab") as file:
        file.write(b'{"kind": "metrics", "ste\n')
    tracker.log_metrics({"loss": 2.0}, 1)
    assert [event.kind for event in read_events(spool, 0)] == ["metrics", "unreadable", "metrics"]


def test_a_disk_that_fills_up_leaves_whole_lines_only(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log_metrics({"loss": 1.0}, 0)
    room = (tracker.folder / SPOOL).stat().st_size + 10
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.warns(UserWarning, match="tracking records are lost: .*File too large"):
            tracker.log_metrics({"loss": 2.0}, 1)  # ten bytes of it fit
        tracker.log_metrics({"loss": 3.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.log_metrics({"loss": 4.0}, 3)
    assert [event["step"] for event in events(tracker)] == [0, 3]


def test_appending_is_fast(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    metrics = {f"metric_{i}": 0.1 * i for i in range(20)}
    times = []
    for step in range(1000):
        began = time.perf_counter()
        tracker.log_metrics(metrics, step)
        times.append(time.perf_counter() - began)
    assert sorted(times)[500] < 5e-4


def test_a_full_disk_costs_a_warning_not_the_run(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    kept = tracker._file
    with Path("/dev/full").open("ab", buffering=0) as full:
        tracker._file = full
        with pytest.warns(UserWarning, match="tracking records are lost"):
            tracker.log_metrics({"loss": 1.0}, 0)
        tracker.log_metrics({"loss": 1.0}, 1)  # said once
    tracker._file = kept
    tracker.log_metrics({"loss": 1.0}, 2)
    assert events(tracker)[-1]["step"] == 2


def test_run_id_is_that_of_the_current_server(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    assert tracker.run_id is None
    assert tracker.wait_for_run_id(0.0) is None
    write_json(tracker.folder / "settings.json", {"uri": "http://a"})
    write_json(tracker.folder / "sent.json", {"uri": "http://a", "run_id": "1", "offset": 0})
    assert tracker.wait_for_run_id(5.0) == "1"
    write_json(tracker.folder / "settings.json", {"uri": "http://b"})
    assert tracker.run_id is None


def test_close_does_not_wait_for_a_sender_that_is_not_there(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    began = time.monotonic()
    assert tracker.close(wait_s=30) is False
    assert time.monotonic() - began < 5
    assert tracker.close() is False
    assert [event["kind"] for event in events(tracker)] == ["finish"]


def test_nothing_waits_for_a_server_that_has_failed_since_the_start(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    write_json(tracker.folder / "settings.json", {"uri": "http://a"})
    failing: dict[str, Any] = {"uri": "http://a", "time": int(time.time() * 1000) + 1}

    def waited(mark: dict[str, Any]) -> bool:
        write_json(tracker.folder / "failing.json", mark)
        began = time.monotonic()
        assert tracker.wait_for_run_id(1.0) is None
        return time.monotonic() - began >= 1.0

    assert waited({**failing, "time": failing["time"] - 60_000})
    assert waited({**failing, "uri": "http://b"})
    assert not waited(failing)
    lock = SenderLock(tracker.folder)
    assert lock.acquire()
    began = time.monotonic()
    assert tracker.close(wait_s=30) is False
    assert RETRY_S <= time.monotonic() - began < 10
    lock.release()


def test_a_spool_is_marked_as_written_until_it_is_closed(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    spool = tracker.folder / SPOOL
    assert is_written(spool)
    resumed = Tracker(tmp_path)
    tracker.close()
    assert is_written(spool)
    resumed.close()
    assert not is_written(spool)


def test_the_lock_excludes_and_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from seer_scale.tracking.lock import SenderLock\n"
        "lock = SenderLock(Path(sys.argv[1])); print(lock.acquire(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "True"
        assert holder(tmp_path) == other.pid
        assert not SenderLock(tmp_path).acquire()
        other.kill()
        other.wait()
        assert holder(tmp_path) is None
        lock = SenderLock(tmp_path)
        assert lock.acquire()
        assert lock.acquire()  # a sender that has it and asks again goes on
        lock.release()


WRITER = """
import os, sys
from pathlib import Path
from seer_scale.storage.ownership import owned
from seer_scale.tracking.lock import SenderLock, holder, is_written
from seer_scale.tracking.spool import SPOOL, Tracker
with owned(Path(sys.argv[1]), "run.dir=x", say=lambda text: None):
    tracker = Tracker(sys.argv[1])
    spool = tracker.folder / SPOOL
    lock, other = SenderLock(tracker.folder), SenderLock(tracker.folder)
    found = [is_written(spool), holder(tracker.folder), lock.acquire(), other.acquire()]
    found += [holder(tracker.folder) == os.getpid()]
    lock.release()
    tracker.close()
print(found + [is_written(spool), holder(tracker.folder)])
"""


@pytest.mark.parametrize("rule", RULES)
def test_without_locks_and_with_nfs_s_rule_all_of_this_holds_too(tmp_path: Path, rule: str) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    said = subprocess.check_output(command, env=environment_with(rule), text=True)
    assert said.strip() == str([True, None, True, False, True, False, None])


def test_the_null_tracker_has_every_verb_and_no_effect(tmp_path: Path) -> None:
    verbs = {name for name in vars(Tracker) if not name.startswith("_")}
    assert verbs - set(vars(NullTracker)) <= {"start", "all_sent", "sender_alive"}
    tracker = NullTracker()
    tracker.log_metrics({"loss": 1.0}, 0)
    tracker.log_model(tmp_path, step=0)
    assert tracker.wait_for_run_id(100) is None
    assert tracker.close() is True
    assert list(tmp_path.iterdir()) == []


def test_the_training_process_never_imports_mlflow() -> None:
    code = "import sys, seer_scale.tracking; print([m for m in sys.modules if 'mlflow' in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.replace("'", '"')) == []
