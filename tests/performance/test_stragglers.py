"""A rank that is always slow is named; the work clock of every rank leaves out collectives."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.jobs import arguments, lines, open_trainer, write_images
from harness.pool import Distributed
from seer_scale import distributed as ranks
from seer_scale.distributed.work_clock import CLOCK, WorkClock
from seer_scale.performance.stragglers import Stragglers

CPU = torch.device("cpu")


def test_the_ratio_is_to_the_median() -> None:
    said: list[str] = []
    watch = Stragglers(said.append)
    assert watch.observe([1.0, 3.0, 2.0]) == {"straggler_ratio": 1.5}
    assert watch.observe([1.0, 3.0]) == {"straggler_ratio": 3.0}
    assert watch.observe([1.0]) == {}
    assert watch.observe([0.0, 0.0]) == {}  # the first step knows nothing yet
    assert said == []


def test_only_who_is_slow_again_and_again_is_named() -> None:
    said: list[str] = []
    watch = Stragglers(said.append, ratio=1.3, patience=3)
    slow_first, slow_last, even = [2.0, 1.0, 1.0], [1.0, 1.0, 2.0], [1.0, 1.2, 1.0]
    for step in [slow_first, slow_first, slow_last, slow_last, even, slow_last, slow_last]:
        watch.observe(step)
    assert said == []
    watch.observe(slow_last)
    assert len(said) == 1
    assert said[0].startswith("warning: rank 2 was the slowest in 3 consecutive steps: 2.000 s of ")
    for _ in range(10):
        watch.observe(slow_last)
    assert len(said) == 1  # once is enough
    watch.observe(even)
    for _ in range(3):
        watch.observe(slow_last)
    assert len(said) == 2


def work(seconds: float) -> tuple[float, float]:
    """Own work of a rank that sleeps before a collective; and how long all of it took."""
    ranks.barrier()
    CLOCK.take()
    began = time.perf_counter()
    with CLOCK.lap(CPU):
        time.sleep(seconds)
        ranks.all_reduce(torch.ones(3))
        ranks.all_gather(torch.ones(3))
    ranks.all_reduce(torch.ones(3))  # outside of a lap nothing counts
    return CLOCK.take(), time.perf_counter() - began


def slow_rank(seconds: float) -> tuple[float, float]:
    return work(seconds * ranks.rank())


def test_waiting_in_a_collective_is_no_work(distributed: Distributed) -> None:
    (fast, whole), (slow, _) = distributed(slow_rank, 2, 0.5)
    assert whole > 0.45  # it waited for the other
    assert fast < 0.2
    assert 0.5 <= slow < 0.8


def test_a_clock_adds_its_laps_and_begins_anew() -> None:
    clock = WorkClock()
    for _ in range(2):
        with clock.lap(CPU):
            time.sleep(0.02)
        time.sleep(0.05)
    assert 0.04 <= clock.take() < 0.08
    assert clock.take() == 0.0
    with contextlib.suppress(KeyError), clock.lap(CPU):
        raise KeyError
    assert not clock.running


def run_with_a_slow_rank(argv: list[str], seconds: float) -> str:
    """A run whose rank 1 waits for its images; what the run says."""
    from seer_scale.data import DeviceBatches

    inner = DeviceBatches.__next__

    def late(self: DeviceBatches) -> Any:
        time.sleep(seconds * ranks.rank())
        return inner(self)

    DeviceBatches.__next__ = late  # type: ignore[method-assign]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            trainer = open_trainer(argv)
            trainer.telemetry.stragglers = Stragglers(trainer.telemetry.say, patience=4)
            try:
                trainer.train()
            finally:
                trainer.close("FINISHED")
    finally:
        DeviceBatches.__next__ = inner  # type: ignore[method-assign]
    return said.getvalue()


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_names_its_slow_rank(distributed: Distributed, tmp_path: Path, strategy: str) -> None:
    images = write_images(tmp_path / "images")
    more = ("train.steps=8", f"sharding.strategy={strategy}")
    argv = arguments(images, tmp_path / "run", *more)
    said, _ = distributed(run_with_a_slow_rank, 2, argv, 0.5)
    assert "warning: rank 1 was the slowest in 4 consecutive steps" in said
    ratios: list[Any] = [line.get("straggler_ratio") for line in lines(tmp_path / "run")]
    assert ratios[0] is None
    assert statistics.median(ratios[1:]) > 1.3
