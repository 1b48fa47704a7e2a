"""Runs pytest in forks of a process that has imported the large libraries and nothing of ours.

Importing torch takes most of the time of a short test. A fork begins with it, and imports the
package and the tests from the folder that it is given, so that it sees what stands there now.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("numpy", "scipy", "torch", "torchvision", "torch.distributed.fsdp", "pydantic", "cv2",
             "PIL.Image", "pytest", "_pytest.assertion", "pytest_timeout", "yaml")  # fmt: skip
POLL_S = 0.02


@dataclass(frozen=True)
class Run:
    """One run of pytest.

    Attributes:
        status: pytest's exit status; None if the time was over.
        output: what it printed.
        seconds: how long it took.
    """

    status: int | None
    output: str
    seconds: float


class WarmPytest:
    """A process that forks for each run; one run at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tempfile.gettempdir(),  # not in a folder that holds the package
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )

    def run(self, root: Path, arguments: list[str], timeout_s: float) -> Run:
        """Runs pytest in the folder `root`; whatever it started in its session is ended."""
        scratch = Path(tempfile.mkdtemp(prefix="mutant-"))
        asked = {"root": str(root), "scratch": str(scratch), "arguments": arguments,
                 "timeout": timeout_s}  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            output = (scratch / "output").read_text(errors="replace")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return Run(answer["status"], output, answer["seconds"])

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """Reads what to run from standard input, a line each, and answers with its status."""
    for name in LIBRARIES:
        importlib.import_module(name)
    assert not any(name.startswith(("seer_scale", "tests", "harness")) for name in sys.modules)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _run(asked)
        status = _wait(child, began + asked["timeout"])
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
        print(json.dumps({"status": status, "seconds": time.monotonic() - began}), flush=True)


def _run(asked: dict[str, str | list[str]]) -> None:
    """Becomes a run of pytest, and ends with its status."""
    import pytest

    root, scratch = str(asked["root"]), str(asked["scratch"])
    os.setsid()
    os.chdir(root)
    output = os.open(os.path.join(scratch, "output"), os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(PYTHONPATH=root, OMP_NUM_THREADS="1", TMPDIR=scratch)
    sys.path[0] = root
    tempfile.tempdir = None  # asked for again
    status = 99
    try:
        # Plugins are there before pytest, which cannot rewrite their assertions.
        ours = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = int(pytest.main([*ours, *asked["arguments"]]))
    finally:
        sys.stdout.flush()
        os._exit(status)


def _wait(child: int, until: float) -> int | None:
    """Exit status of a child; None if it has not ended by then."""
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL_S)
    return None


if __name__ == "__main__":
    serve()
