"""What tests of offload to NVMe need: libaio, and an extension that is compiled once."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest

# An EPYC of 2 cores compiled for 6.5 minutes, beside nothing.
COMPILING_SECONDS = 1500
COMPILE = "from seer_scale.parallel.zero import compile_for_nvme; compile_for_nvme()"


@cache
def prepare_nvme() -> None:
    """Compiles DeepSpeed's asynchronous file access where it is missing; may take minutes.

    A test that calls it needs `pytest.mark.timeout(COMPILING_SECONDS + ...)`. It is skipped where
    libaio is missing.
    """
    from seer_scale.parallel.zero import missing_for_nvme

    if reason := missing_for_nvme():
        pytest.skip(f"nvme: {reason}")
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=COMPILING_SECONDS)
