"""`make mutants` tells killed from survived, goes on where it was, and leaves the tree as it is."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.mutants import digest_of_tree
from benchmarks.warm_pytest import WarmPytest
from harness.jobs import ROOT

PATCHES = """
[[patch]]
name = "noticed"
file = "seer_scale/optim/schedules.py"
old = "return step < freeze_steps"
new = "return step <= freeze_steps"
why = "a named test notices it"
tests = ["tests/optim/test_schedules.py::test_prototypes_are_frozen_for_exactly_the_first_steps"]

[[patch]]
name = "noticed-by-an-import"
file = "seer_scale/optim/schedules.py"
old = "return base_lr * batch / REFERENCE_BATCH"
new = "return base_lr * batch"
why = "a test file that imports the module notices it"

[[patch]]
name = "the-same"
file = "seer_scale/optim/schedules.py"
old = "REFERENCE_BATCH = 256"
new = "REFERENCE_BATCH = 2**8"
why = "nothing changes"
argued = "Both sides are the same number, so that nothing can tell them apart."

[[patch]]
name = "open"
file = "seer_scale/optim/schedules.py"
old = "return step < freeze_steps"
new = "return not step >= freeze_steps"
why = "nothing changes, and nobody says so"

[[patch]]
name = "judged-by-nothing"
file = "seer_scale/optim/schedules.py"
old = "return step < freeze_steps"
new = "return True"
why = "its test is not there"
tests = ["tests/optim/test_schedules.py::test_that_is_not_there"]
"""


def mutants(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/mutants.py", "--without-golden"]
    places = ["--patches", str(folder), "--results", str(folder / "results.jsonl")]
    return subprocess.run(
        [*command, *places, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def verdicts(output: str) -> dict[str, str]:
    lines = [line for line in output.splitlines() if line.startswith(("killed", "survived", "not"))]
    return {line[11:].split()[0]: line[:10].strip() for line in lines}


def test_survivors_get_another_chance_when_code_or_tests_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.mutants.ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.mutants.PATCHES", tmp_path / "tests" / "mutants")
    for file in ("seer_scale/a.py", "tests/test_a.py", "tests/mutants/a.toml", "conftest.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    digests = [digest_of_tree()]
    for file in ("seer_scale/a.py", "tests/test_a.py"):
        (tmp_path / file).write_text("a = 1\n")
        digests.append(digest_of_tree())
    assert len(set(digests)) == 3
    (tmp_path / "tests/mutants/a.toml").write_text("a = 1\n")
    assert digest_of_tree() == digests[-1]


@pytest.mark.slow
def test_killed_survived_and_not_judged_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "optim.toml").write_text(PATCHES)
    before = (ROOT / "seer_scale/optim/schedules.py").stat()
    done = mutants(tmp_path, "--only", "optim/judged*", "--only", "never", "--package", "optim")
    assert done.returncode == 1, done.stderr
    assert "test_that_is_not_there" in done.stdout + done.stderr
    (tmp_path / "optim.toml").write_text(PATCHES.partition('\n[[patch]]\nname = "judged')[0])
    done = mutants(tmp_path, "--jobs", "2")
    assert done.returncode == 1, done.stderr
    assert verdicts(done.stdout) == {
        "optim/noticed": "killed",
        "optim/noticed-by-an-import": "killed",
        "optim/the-same": "survived",
        "optim/open": "survived",
    }
    assert "test_prototypes_are_frozen_for_exactly_the_first_steps" in done.stdout
    assert done.stderr == "without an argument: optim/open\n"
    assert "| `optim` | 4 | 2 | 2 | 50% |" in done.stdout
    again = mutants(tmp_path, "--only", "noticed*", "--only", "the-same")
    assert again.returncode == 0, again.stderr
    assert "3 patches, 0 to judge" in again.stdout
    after = (ROOT / "seer_scale/optim/schedules.py").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.slow
def test_a_run_sees_its_folder_and_ends_with_all_that_it_started(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    (tmp_path / "it.py").write_text("VALUE = 1\n")
    test.write_text("from it import VALUE\n\ndef test_it():\n    assert VALUE == 1\n")
    slow = tmp_path / "test_slow.py"
    slow.write_text(
        "import pathlib, subprocess\n\ndef test_slow():\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        "    pathlib.Path('child').write_text(str(child.pid))\n"
        "    child.wait()\n"
    )
    quietly = ["-q", "-p", "no:cacheprovider"]
    warm = WarmPytest()
    try:
        assert warm.run(tmp_path, [*quietly, test.name], 60).status == 0
        (tmp_path / "it.py").write_text("VALUE = 2  # longer\n")
        failed = warm.run(tmp_path, [*quietly, test.name], 60)
        assert failed.status == 1
        assert "assert 2 == 1" in failed.output
        late = warm.run(tmp_path, [*quietly, slow.name], 5)
        assert late.status is None
        child = int((tmp_path / "child").read_text())
        until = time.monotonic() + 60
        while psutil.pid_exists(child) and time.monotonic() < until:
            time.sleep(0.1)
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
    finally:
        warm.close()
