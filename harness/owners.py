"""A process that owns a path, for tests of those that come second."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.locks import environment_with

OWN = """
import sys, time
from pathlib import Path
from seer_scale.storage.ownership import owned
with owned(Path(sys.argv[1]), "run.dir=x", beside=len(sys.argv) > 2):
    print("mine", flush=True)
    time.sleep(300)
"""


@contextmanager
def own_elsewhere(
    path: Path, rule: str = "", *, beside: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A process that owns `path` until it is killed, at the end of the block at the latest."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWN, str(path), *(["beside"] if beside else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_with(rule),
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "mine\n"
            yield process
        finally:
            process.kill()
