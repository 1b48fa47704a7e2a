"""torch's record of collectives: switched on, put into words, and written or not."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness.pool import Distributed
from seer_scale import distributed as seer
from seer_scale.distributed import flight_recorder


def after_init() -> str | None:
    for name in flight_recorder.VARIABLES:
        os.environ.pop(name, None)
    seer.init()
    return os.environ.get("TORCH_FR_BUFFER_SIZE")


def test_a_run_switches_it_on(distributed: Distributed) -> None:
    assert distributed(after_init, 2) == ["2000"] * 2


@pytest.mark.parametrize("name", flight_recorder.VARIABLES)
def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for each in flight_recorder.VARIABLES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "0")
    flight_recorder.switch_on()
    assert {each: os.environ.get(each) for each in flight_recorder.VARIABLES} == {
        each: "0" if each == name else None for each in flight_recorder.VARIABLES
    }


def at_rest() -> str:
    """The record once no collective is under way: it is noted as done after the call is back."""
    deadline = time.monotonic() + 60
    while (words := flight_recorder.present()).startswith("in ") and "none" not in words:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return words


def in_words() -> list[str]:
    pair: Any = dist.new_group([0, 1], group_desc="pair")
    dist.all_reduce(torch.ones(2, 3), group=pair)
    first = at_rest()
    dist.broadcast(torch.ones(7), src=0, group=pair)
    return [first, at_rest()]


def test_it_is_put_into_words(distributed: Distributed) -> None:
    for first, second in distributed(in_words, 2):
        assert first.startswith("in none, after all_reduce 1 of group ")
        assert first.endswith(" (pair) on [2,3]")
        assert second.startswith("in none, after broadcast 2 of group ")
        assert second.endswith(" (pair) on [7]")


def in_trouble(folder: str, recorder: str) -> str | None:
    never = threading.Event()
    real: tuple[Any, float] = flight_recorder._trace, flight_recorder.SECONDS
    replaced = {"torch's": real[0], "none": lambda: None, "stuck": lambda: never.wait(60)}
    flight_recorder._trace = replaced[recorder]
    flight_recorder.SECONDS = 1.0
    try:
        return flight_recorder.write(Path(folder), dist.get_rank())
    finally:
        flight_recorder._trace, flight_recorder.SECONDS = real
        never.set()


@pytest.mark.parametrize(
    ("folder", "recorder", "problem"),
    [
        ("", "torch's", None),
        ("file/below", "torch's", "Not a directory"),
        ("", "none", "this torch keeps none"),
        ("", "stuck", "it took longer than 1 s"),
    ],
)
def test_a_record_that_cannot_be_written_is_a_reason(
    distributed: Distributed, tmp_path: Path, folder: str, recorder: str, problem: str | None
) -> None:
    (tmp_path / "file").touch()
    assert distributed(in_trouble, 2, str(tmp_path / folder), recorder) == [problem] * 2
    assert (tmp_path / "rank_1.json").exists() is (problem is None)
