"""A step reuses the memory that the step before freed: the system maps no new pages."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from harness.jobs import ROOT

STEPS = """
import resource, sys
import torch
from seer_scale.performance.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory(ranks=2)

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size << 18) for size in (8, 64, 1, 33, 16)]  # MiB
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults_of_a_step()
print(min(faults_of_a_step() for _ in range(5)))
rollup = open("/proc/self/smaps_rollup").read()
print(next(line.split()[1] for line in rollup.splitlines() if line.startswith("AnonHugePages")))
"""


def faults_and_huge_kib(how: str) -> tuple[int, int]:
    command = [sys.executable, "-c", STEPS, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    faults, huge = map(int, done.stdout.split())
    return faults, huge


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told how")
def test_freed_memory_is_kept_in_huge_pages() -> None:
    usual, _ = faults_and_huge_kib("usual")
    kept, huge = faults_and_huge_kib("keep")
    assert usual > 1000  # 122 MiB are 31,000 pages; the system may map several at once
    assert kept < 100
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if allowed.exists() and "[never]" not in allowed.read_text():
        assert huge > 64 << 10  # at least half of the tensors
