"""A clock that jumps: what is measured or waited for never depends on the time of day."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.jobs import ROOT, arguments, lines, run_job, write_images
from harness.pool import Distributed

# Moments that are written down for people, or compared with another process's.
MOMENTS = {
    "seer_scale/doctor/clock.py": 2,  # held against other clocks
    "seer_scale/storage/ownership.py": 2,  # age of a mark that another machine has written
    "seer_scale/train/collection.py": 1,  # unix_time of refreshes.jsonl
    "seer_scale/tracking/spool.py": 1,
    "seer_scale/tracking/delivery.py": 2,
    "seer_scale/tracking/sender.py": 1,
    "seer_scale/tracking/mlflow_client/models.py": 1,
    "seer_scale/tracking/mlflow_client/results.py": 1,
}


def clock_calls(text: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.time", "time.time_ns"):
            yield node


def test_the_time_of_day_is_read_for_moments_only() -> None:
    paths = [*ROOT.glob("seer_scale/**/*.py"), *ROOT.glob("launch/*.py")]
    found = {}
    for path in paths:
        if count := len(list(clock_calls(path.read_text()))):
            found[path.relative_to(ROOT).as_posix()] = count
    assert found == MOMENTS
    assert len(list(clock_calls("a = time.time() - time.time_ns() / 1e9 + time.monotonic()"))) == 2


def run_with_a_mad_clock(argv: list[str]) -> int:
    """Every look at the clock finds another day, now a later and now an earlier one."""
    honest, honest_ns, looks = time.time, time.time_ns, 0

    def mad() -> float:
        nonlocal looks
        looks += 1
        days: int = (-1) ** looks * looks
        return honest() + 86_400 * days

    time.time, time.time_ns = mad, lambda: int(1e9 * mad())
    try:
        return run_job(argv)
    finally:
        time.time, time.time_ns = honest, honest_ns


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2])
def test_a_run_does_not_notice(distributed: Distributed, tmp_path: Path, world_size: int) -> None:
    images = write_images(tmp_path / "images")
    calm, mad = tmp_path / "calm", tmp_path / "mad"
    distributed(run_job, world_size, arguments(images, calm))
    began = time.monotonic()
    distributed(run_with_a_mad_clock, world_size, arguments(images, mad))
    took = time.monotonic() - began
    assert [line["loss"] for line in lines(mad)] == [line["loss"] for line in lines(calm)]
    for line in lines(mad):
        assert 0 < line["step_time"] < took
        assert 0 <= line["data_time"] < took
        assert line["images_per_second"] > 0
        assert 0 <= line.get("checkpoint_seconds", 0) < took
