"""`make test-processors`: what it sets, and what it says of tests that depend on the processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.jobs import ROOT

SCRIPT = ROOT / ".ci" / "processors.py"
DEPENDS = """
import os

def test_of_threads():
    assert os.environ["OMP_NUM_THREADS"] == "1"

def test_that_no_other_setting_is_left():
    assert not ("MKL_CBWR" in os.environ and "MKL_ENABLE_INSTRUCTIONS" in os.environ)
"""


@pytest.mark.long
def test_every_processor_has_a_line_and_failures_come_last(tmp_path: Path) -> None:
    tests = tmp_path / "test_depends.py"
    tests.write_text(DEPENDS)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tests)],
        env={**os.environ, "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    results = [line.split(" ")[0] for line in lines[:4]]
    assert results == ["passed", "FAILED", "passed", "FAILED"], done.stdout
    assert "OMP_NUM_THREADS=2" in lines[1]
    assert "\n".join(lines[4:]).count("::test_of_threads") == 2
    assert "::test_that_no_other_setting_is_left" not in done.stdout
    assert done.returncode == 1


def test_tests_that_pass_everywhere_end_well(tmp_path: Path) -> None:
    (tmp_path / "test_passes.py").write_text("def test_passes():\n    pass\n")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "test_passes.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == ["passed"] * 4
