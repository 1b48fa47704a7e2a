"""The soak in a short version: every kind of fault at least once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.soak_faults import CALM_FROM, PER_2000, schedule
from harness.jobs import ROOT


def test_faults_follow_from_the_seed() -> None:
    found = schedule(2000, 0)
    assert found == schedule(2000, 0) != schedule(2000, 1)
    assert {fault for _, fault in found} == set(PER_2000)
    assert len(found) == sum(PER_2000.values())
    assert all(
        step < CALM_FROM * 2000 for step, fault in found if fault in ("kill", "second start")
    )
    assert {fault for _, fault in schedule(100, 0)} == set(PER_2000)


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(1500)
def test_a_run_outlives_bad_luck() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--steps", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BAD" not in done.stdout
