"""The progress display: plain lines without a terminal, a bar on a real one."""

from __future__ import annotations

import os
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from io import StringIO
from typing import TextIO

import pytest

from seer_scale.tracking.progress import Progress

METRICS = {"loss": 2.71828, "lr": 0.125, "images_per_second": 12.34, "peak_memory_gib": 1.5}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the display believes in; set its one element."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_are_plain_lines(clock: list[float]) -> None:
    stream = StringIO()
    display = Progress(100, 20, stream)
    clock[0] += 2.0
    display.update(21, METRICS)
    assert stream.getvalue() == (
        "step 21/100  loss 2.7183  lr 0.125  12.3 img/s  1.50 GiB  ETA 0:02:38\n"
    )
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_lines_come_now_and_then_and_at_the_end(clock: list[float]) -> None:
    stream = StringIO()
    display = Progress(30, 0, stream)
    for step in range(1, 31):
        clock[0] += 1.0
        display.update(step, METRICS)
    steps = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert steps == ["1/30", "11/30", "21/30", "30/30"]
    assert stream.getvalue().splitlines()[-1].endswith("ETA 0:00:00")


@pytest.mark.parametrize(
    ("seconds", "eta"), [(0.5, "0:00:49"), (60.0, "1:39:00"), (3600.0, "99:00:00")]
)
def test_eta_is_the_time_per_step_so_far_times_what_is_left(
    clock: list[float], seconds: float, eta: str
) -> None:
    stream = StringIO()
    display = Progress(100, 0, stream)
    clock[0] += seconds
    display.update(1, METRICS)
    assert stream.getvalue().endswith(f"ETA {eta}\n")


def test_eta_of_a_resumed_run_counts_its_own_steps_only(clock: list[float]) -> None:
    stream = StringIO()
    display = Progress(100, 80, stream)
    clock[0] += 40
    display.update(84, METRICS)  # 10 s for each of 4 steps, and 16 are left
    assert stream.getvalue().endswith("ETA 0:02:40\n")


def test_rate_and_eta_are_those_of_the_last_twenty_steps(clock: list[float]) -> None:
    """The first steps, which are slow, are forgotten; one slow step hardly shows."""
    stream = StringIO()
    display = Progress(100, 0, stream)
    for step in range(1, 61):
        slow = step <= 40
        clock[0] += 10.0 if slow else 2.0
        speed = 1.0 if slow else (20.0 if step % 2 else 5.0)
        display.update(step, {**METRICS, "images_per_second": speed})
    clock[0] += 20.0
    display.update(61, {**METRICS, "images_per_second": 5.0})
    last = stream.getvalue().splitlines()[-1]
    # Of steps 42 to 61: 9 at 1/20 s an image and 11 at 1/5 s; 19 x 2 s and one of 20 s.
    assert f"  {20 / (9 / 20 + 11 / 5):.1f} img/s  " in last
    assert last.endswith(f"ETA 0:01:{int((19 * 2 + 20) / 20 * 39) - 60:02d}\n".strip())


def test_a_line_in_between_is_said_as_it_is() -> None:
    stream = StringIO()
    display = Progress(10, 0, stream)
    display.say("warning: two\nlines")
    display.close()
    assert stream.getvalue() == "warning: two\nlines\n"


def shown_on_terminal(act: Callable[[TextIO], None]) -> str:
    """What a terminal of 120 columns receives while `act` writes to it."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with os.fdopen(theirs, "w") as terminal:
        act(terminal)
    received = b""
    # The end of a pseudo-terminal whose other side is closed is an error.
    with suppress(OSError):
        while part := os.read(ours, 1 << 16):
            received += part
    os.close(ours)
    return received.decode()


def test_a_terminal_gets_a_bar(clock: list[float]) -> None:
    def run(terminal: TextIO) -> None:
        display = Progress(10, 4, terminal)
        for step in range(5, 11):
            clock[0] += 1.0
            display.update(step, METRICS)
            if step == 7:
                display.say("half way")
        display.close()
        display.close()

    shown = shown_on_terminal(run)
    assert "half way\r\n" in shown  # a line of its own
    states = [state for state in shown.split("\r") if "/10" in state]
    assert "4/10" in states[0]
    assert "10/10" in states[-1]
    assert "loss 2.7183" in states[-1]
    assert "12.3 img/s" in states[-1]


def test_a_run_that_is_done_already_shows_its_last_state() -> None:
    assert "10/10" in shown_on_terminal(lambda terminal: Progress(10, 10, terminal).close())


def test_a_full_disk_or_a_closed_terminal_does_not_end_the_run() -> None:
    with open("/dev/full", "w") as stream:
        display = Progress(10, 0, stream)
        display.say("this line is lost")
        display.update(1, METRICS)
        display.close()
        with suppress(OSError):
            stream.close()
    ours, theirs = os.openpty()
    terminal = os.fdopen(theirs, "w")
    bar = Progress(10, 0, terminal)
    os.close(ours)
    bar.say("nobody reads this")
    bar.update(1, METRICS)
    bar.close()
    with suppress(OSError):
        terminal.close()
