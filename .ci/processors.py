"""Runs the numeric tests as other processors would: `make test-processors [TESTS="PATH ..."]`.

torch, oneDNN and MKL choose their kernels by the processor that they find, and each has a variable
that makes it choose as on a lesser one. A sum of float32 numbers then has another order, so other
last bits; an expectation that depends on these fails here first. Four processors stand for all
combinations: every value of every variable occurs, and both numbers of threads with AVX2.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Values that a processor lacks have no effect. MKL_ENABLE_INSTRUCTIONS has one on Intel's alone;
# MKL_CBWR=COMPATIBLE takes on any processor the kernels that MKL has for others than Intel's.
PROCESSORS = {
    "SSE4, one thread": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "OMP_NUM_THREADS": "1",
    },
    "AVX2, two threads": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OMP_NUM_THREADS": "2",
    },
    "AVX2, MKL for any make, one thread": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "COMPATIBLE",
        "OMP_NUM_THREADS": "1",
    },
    "AVX-512 without matrix tiles, two threads": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "OMP_NUM_THREADS": "2",
    },
}
# What computes with torch, but starts no launcher and trains no run to its end.
NUMERIC = [
    *("tests/optim", "tests/objectives", "tests/models", "tests/parallel", "tests/convert"),
    *("tests/evaluation", "--ignore=tests/evaluation/test_during_training.py"),
    *("tests/performance/test_host_reads.py", "tests/performance/test_flops.py"),
    "tests/train/test_nonfinite.py",
]
PYTEST = [sys.executable, "-m", "pytest", "-m", "not slow and not launch", "--tb=short"]


def run(processor: str, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs `tests` as on a processor, and prints a line with the result."""
    variables = PROCESSORS[processor]
    others = {name for chosen in PROCESSORS.values() for name in chosen} - set(variables)
    environment = {name: value for name, value in os.environ.items() if name not in others}
    began = time.monotonic()
    done = subprocess.run(
        [*PYTEST, *tests],
        cwd=ROOT,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    result = "FAILED" if done.returncode else "passed"
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    minutes = (time.monotonic() - began) / 60
    print(f"{result}  {processor} ({settings}): {minutes:.1f} minutes", flush=True)
    return done


def main(tests: list[str]) -> int:
    """Runs `tests`, by default the numeric ones, as on every processor; returns the exit status."""
    results = {processor: run(processor, tests or NUMERIC) for processor in PROCESSORS}
    failed = {processor: done for processor, done in results.items() if done.returncode}
    for processor, done in failed.items():
        print(f"\n{'=' * 20} {processor}\n{done.stdout}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
