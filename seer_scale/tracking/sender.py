"""Sends a spool to MLflow: from a detached process beside the training, or by `seer-scale sync`.

    python -m seer_scale.tracking.sender RUN_DIR [--drain SECONDS]

forks, leaves its caller at once, follows the spool and ends with the run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from seer_scale.errors import UserError
from seer_scale.tracking.delivery import Delivery, Unreachable
from seer_scale.tracking.lock import SenderLock, holder, is_written
from seer_scale.tracking.refusals import refusals
from seer_scale.tracking.spool import FOLDER, SENT, SETTINGS, SPOOL, end_of, read_json
from seer_scale.tracking.uri import redact, resolve_uri, with_credentials

POLL_S = 0.5
LONGEST_WAIT_S = 30.0
SYNC_ATTEMPTS = 5
TAKE_OVER_S = 90.0


@dataclass(frozen=True)
class Outcome:
    """Result of `sync`; `reason` says why events are left, `refusals` what was refused for good.

    `rejected` counts the refusals by all senders of this run.
    """

    sent: int
    rejected: int
    left: int
    run_id: str | None
    reason: str
    refusals: str | None


def sync(run_dir: Path | str, uri: str | None = None) -> Outcome:
    """Sends the rest of the spool of `run_dir`, and ends the MLflow run with the recorded status.

    Takes over from the run's own sender if that sender still tries after the end of the run.

    Args:
        run_dir: a run's folder, wherever it lies now.
        uri: another server than the run's own; it gets the whole run.

    Raises:
        UserError: if the folder holds no tracked run, or its training still runs, or another
            process has it and makes no progress.
    """
    folder = Path(run_dir) / FOLDER
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"{run_dir} is not the folder of a tracked run: it has no {FOLDER}/{SETTINGS}"
        )
    lock = SenderLock(folder)
    try:
        _take_over(lock, folder)
        recorded: str = read_json(folder / SETTINGS)["uri"]
        delivery = Delivery(folder, resolve_uri(uri) if uri else with_credentials(recorded))
        return _send_all(delivery)
    finally:
        lock.release()


def _take_over(lock: SenderLock, folder: Path) -> None:
    """Acquires `lock`: asks a follower to end, or waits for another `sync`."""
    asked, offset, deadline = 0, None, 0.0
    while not lock.acquire():
        now, reached = time.monotonic(), read_json(folder / SENT).get("offset", 0)
        if reached != offset:
            offset, deadline = reached, now + TAKE_OVER_S
        training = end_of(folder) is None and is_written(folder / SPOOL)
        pid = holder(folder)
        if pid is not None and (training or now > deadline):
            raise UserError(f"{folder.parent} is being sent by process {pid}; wait for it to end")
        if pid and pid != asked and _is_follower(pid, folder):
            with contextlib.suppress(OSError):  # gone by now, or another user's
                os.kill(pid, signal.SIGTERM)
            asked = pid
        time.sleep(0.1)


def _is_follower(pid: int, folder: Path) -> bool:
    """Tells whether `pid` is this run's detached sender, and not a process of another machine."""
    try:
        command = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return {"seer_scale.tracking.sender", str(folder.parent.resolve())} <= set(command)


def _send_all(delivery: Delivery) -> Outcome:
    sent, reason, attempts, before = 0, "", 0, delivery.rejected
    while True:
        try:
            events = delivery.step()
        except Unreachable as error:
            reason, attempts = str(error), attempts + 1
            if attempts == SYNC_ATTEMPTS:
                break
            time.sleep(min(2.0**attempts / 2, LONGEST_WAIT_S))
            continue
        if not events:
            reason = ""
            _end_if_killed(delivery)
            break
        sent, attempts = sent + len(events), 0
    rejected = delivery.rejected
    sent -= rejected - before
    told = refusals(delivery.sent, delivery.folder)
    return Outcome(sent, rejected, delivery.left(), delivery.sent["run_id"], reason, told)


def follow(folder: Path, lock: SenderLock, training: Callable[[], bool], drain_s: float) -> None:
    """Sends the growing spool until the run has ended and everything is sent.

    Args:
        folder: `<run_dir>/tracking`.
        lock: waited for while another sender has it.
        training: whether the process that writes the spool still lives.
        drain_s: how long to go on without progress once the run has ended.
    """
    while not lock.acquire():
        if not training():
            return  # whoever holds the lock reads to the end of the spool
        time.sleep(POLL_S)
    settings = read_json(folder / SETTINGS)
    delivery = Delivery(folder, with_credentials(settings["uri"]))
    monitor: Any = None
    wait, retry_at, ended_at, progress_at = 0.0, 0.0, None, time.monotonic()
    while True:
        now = time.monotonic()
        if ended_at is None and (end_of(folder) or not training()):
            ended_at, retry_at = now, now
            _stop(monitor)
            monitor = None
        if now >= retry_at:
            try:
                events = delivery.step()
            except Unreachable as error:
                wait = min(2 * wait or 1.0, LONGEST_WAIT_S)
                retry_at = time.monotonic() + wait
                _say(f"not sent, next attempt in {wait:.0f} s: {error}")
                _stop(monitor)
                monitor = None
            else:
                if events:
                    wait, progress_at = 0.0, time.monotonic()
                    if monitor is None and ended_at is None and settings["system_metrics"]:
                        monitor = _start_monitor(delivery)
                    continue
                if ended_at is not None:
                    _end_if_killed(delivery)
                    return
        if ended_at is not None and time.monotonic() - max(ended_at, progress_at) > drain_s:
            _say(f"{delivery.left()} events are left for `seer-scale sync`")
            return
        time.sleep(POLL_S)


def _start_monitor(delivery: Delivery) -> Any:
    try:
        return delivery.run.system_metrics()
    except Exception as error:  # of a driver or library that reads the figures
        _say(f"no system metrics: {error}")
        return None


def _stop(monitor: Any) -> None:
    if monitor is not None:
        monitor.finish()


def _end_if_killed(delivery: Delivery) -> None:
    """Ends the MLflow run of a killed training process, which wrote no end itself."""
    if delivery.sent["run_id"] and end_of(delivery.folder) is None:
        try:
            delivery.run.finish("KILLED", time.time_ns() // 1_000_000)
        except Exception as error:
            _say(f"the run's end could not be sent: {error}")


def _say(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), redact(text), file=sys.stderr, flush=True)


def main() -> None:
    """Entry point of the detached sender."""
    parser = argparse.ArgumentParser(prog="python -m seer_scale.tracking.sender")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--drain", type=float, default=60.0, metavar="SECONDS")
    arguments = parser.parse_args()
    folder: Path = arguments.run_dir / FOLDER
    parent = psutil.Process(os.getppid())

    def training() -> bool:
        try:
            return bool(parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    waits, acquired = os.pipe()
    if os.fork():
        os.close(acquired)
        os.read(waits, 1)  # the caller goes on once there is a sender at work
        os._exit(0)
    lock = SenderLock(folder)
    lock.acquire()
    os.close(acquired)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)

    def leave(*_: object) -> None:
        # A launcher that ends a job signals everything; what the run says last is still to come.
        if end_of(folder) or not training():
            os._exit(1)  # at once, whatever is under way: who sends next repeats it

    signal.signal(signal.SIGTERM, leave)
    try:
        follow(folder, lock, training, arguments.drain)
    except Exception:
        _say(traceback.format_exc())
        sys.exit(1)


if __name__ == "__main__":
    main()
