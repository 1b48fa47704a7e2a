"""Signals that ask a run to stop, and those that end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.jobs import ROOT
from seer_scale.errors import STOP_SIGNALS
from seer_scale.train.stopping import TOGETHER_S, Stop, StopSignals

APART_S = TOGETHER_S + 0.5


@pytest.mark.parametrize(
    ("number", "wish"),
    [(signal.SIGINT, Stop.DONE), (signal.SIGTERM, Stop.REQUEUE), (signal.SIGUSR1, Stop.REQUEUE)],
)
def test_a_signal_is_remembered_and_handlers_are_given_back(number: int, wish: Stop) -> None:
    before = signal.getsignal(number)
    signals = StopSignals()
    try:
        assert signals.wish is Stop.NO
        os.kill(os.getpid(), number)
        assert signals.wish is wish
    finally:
        signals.close()
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


# A main thread that never comes back from what it does: `%s`.
STUCK = """
import os, sys, time
from seer_scale.train.stopping import StopSignals
signals = StopSignals()
print("ready", flush=True)
%s
"""
ASLEEP = "while True: time.sleep(3600)"
# A C function that waits again whatever it hears, as a library's may: for a lock without owner.
IN_C = """
import ctypes
lock = ctypes.create_string_buffer(64)
for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(lock)
"""
# The system itself: nobody answers for this mount, so that only SIGKILL interrupts whoever asks.
DEAD_MOUNT = """
import ctypes
fuse = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
if ctypes.CDLL(None, use_errno=True).mount(b"dead", sys.argv[1].encode(), b"fuse", 0, options):
    print("not mounted", flush=True)
    sys.exit(0)
print("mounted", flush=True)
os.stat(sys.argv[1] + "/image.jpg")
"""


def start(stuck: str, folder: Path, *before: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*before, sys.executable, "-c", STUCK % stuck, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    try:
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, said.splitlines()


@pytest.mark.parametrize("stuck", [ASLEEP, IN_C], ids=["python", "C"])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_second_signal_ends_a_process_that_never_comes_back(
    number: signal.Signals, stuck: str, tmp_path: Path
) -> None:
    process = start(stuck, tmp_path)
    process.send_signal(number)
    time.sleep(APART_S)
    assert process.poll() is None
    process.send_signal(number)
    status, said = ended(process)
    assert status == (130 if number == signal.SIGINT else 76)
    assert len(said) == 2
    assert said[0].startswith(f"{number.name}: the run finishes this step, saves and ends;")
    assert said[1].startswith(
        f"error: rank 0 was ended at once by a second signal ({number.name}), before it had saved"
    )


def test_the_second_signal_ends_a_process_that_waits_for_a_dead_mount(tmp_path: Path) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or os.getuid():
        pytest.skip("needs FUSE, and root to mount it")
    permitted = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    if permitted.returncode:
        pytest.skip("needs the right to a mount namespace of its own")
    process = start(DEAD_MOUNT, tmp_path, "unshare", "-m")
    assert process.stdout is not None
    if process.stdout.readline() != "mounted\n":
        process.kill()
        pytest.skip("needs the right to mount FUSE")
    time.sleep(0.5)  # until it asks
    process.send_signal(signal.SIGINT)
    time.sleep(APART_S)
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    assert status == 76, said
    assert "ended at once by a second signal (SIGTERM)" in said[-1]


def test_a_signal_that_a_launcher_passes_on_is_not_the_second() -> None:
    """Ctrl-C reaches the ranks from the terminal, and once more from the launcher."""
    signals = StopSignals()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(TOGETHER_S / 4)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        assert signals.wish is Stop.REQUEUE
    finally:
        signals.close()


def test_the_signal_after_a_batch_system_s_warning_is_the_first(tmp_path: Path) -> None:
    process = start(ASLEEP, tmp_path)
    process.send_signal(signal.SIGUSR1)
    time.sleep(APART_S)
    process.send_signal(signal.SIGTERM)
    time.sleep(APART_S)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    assert status == 76
    assert [line.split(":")[0] for line in said] == ["SIGUSR1", "SIGTERM", "error"]
