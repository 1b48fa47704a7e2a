"""The faults of the soak: what a machine and its users do to a run, caused and ended again.

`World` is what they happen in; `cause` brings one about and says when and how it ends.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

from harness.locks import environment_with
from harness.mounts import unshared_tmpfs
from seer_scale.distributed.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
PER_2000 = {
    "kill": 8,
    "stop": 8,
    "outage": 6,
    "full disk": 6,
    "full /dev/shm": 4,
    "second start": 4,
    "no locks": 4,
    "stalled images": 4,
}
CALM_FROM = 0.6  # share of the steps after which no process is killed or started
SMALL_FILES = 20_000  # bytes that a file may have while the disk is full
SHARED_MEMORY = "64m"  # docker's own
SECOND_S = 300.0  # longest time that a second start may take to be refused

Ending = tuple[float, Callable[[], None]]  # when, and how


class MlflowServer:
    """An MLflow server that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server without waiting for it."""
        if self.process is None:
            command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
            command += ["--host", "127.0.0.1", "--port", str(self.port)]
            command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
            command += ["--artifacts-destination", str(self.folder / "artifacts")]
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kills the server."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def wait(self) -> None:
        """Waits until the server answers."""
        for _ in range(600):
            with suppress(OSError), urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return
            time.sleep(0.2)
        raise TimeoutError("the MLflow server does not come up")


@dataclass
class World:
    """What the faults happen in.

    Attributes:
        folder: for files that switch faults on.
        server: the run's MLflow server.
        second: command that starts the same run once more.
        seconds: second starts under way.
        refused: for each second start that has ended, whether it was refused in a sentence.
    """

    folder: Path
    server: MlflowServer
    second: Sequence[str]
    seconds: list[subprocess.Popen[str]] = field(default_factory=list)
    refused: list[bool] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        """Environment of the run: locks and reads of images fail while their switches are there."""
        stall = self.folder / "stall.so"
        source = ROOT / "tests" / "launch" / "stall.c"
        command = ["cc", "-shared", "-fPIC", "-o", str(stall), str(source), "-ldl"]
        subprocess.run(command, check=True)
        mine = environment_with("none", self.folder / "run", switch=self.switch("no locks"))
        return mine | {
            "OMP_NUM_THREADS": "1",
            "LD_PRELOAD": f"{mine['LD_PRELOAD']}:{stall}",
            "STALL_PART": ".jpg",
            "STALL_FOR": "r",
            "STALL_ON": str(self.switch("stalled images")),
            "STALL_MARK": str(self.folder / "stalled"),
        }

    def switch(self, fault: str) -> Path:
        """File that is there while the fault lasts."""
        return self.folder / fault.replace(" ", "-")

    def look_at_seconds(self) -> bool:
        """Notes how second starts ended; tells whether one is under way."""
        for process in [one for one in self.seconds if one.poll() is not None]:
            _, said = process.communicate()
            self.refused.append(process.returncode == 1 and " is in use by process " in said)
            self.seconds.remove(process)
        return bool(self.seconds)


def small_shared_memory() -> list[str]:
    """Beginning of a command that has little /dev/shm of its own; empty if none can be mounted."""
    found = unshared_tmpfs("/dev/shm", SHARED_MEMORY)
    if not found:
        print("nothing can be mounted here: /dev/shm stays as it is", flush=True)
    return found


def schedule(steps: int, seed: int) -> list[tuple[int, str]]:
    """Draws the faults: (step, fault) in order of steps."""
    rng = random.Random(seed)
    found = []
    for fault, count in PER_2000.items():
        for _ in range(max(1, round(count * steps / 2000))):
            last = CALM_FROM if fault in ("kill", "second start") else 0.95
            found.append((rng.randrange(steps // 50 + 1, int(last * steps)), fault))
    return sorted(found)


def cause(fault: str, ranks: dict[int, int], world: World, rng: random.Random) -> Ending | None:
    """Brings a fault about; returns when and how to end it, or None if there is nothing to end.

    Args:
        fault: one of `PER_2000`.
        ranks: process id of each rank.
        world: what it happens in.
        rng: draws the rank and the time.

    Raises:
        ProcessLookupError: a rank has ended meanwhile.
    """
    pid, until = ranks[rng.choice(sorted(ranks))], time.monotonic() + rng.uniform(1, 5)
    match fault:
        case "kill":
            os.kill(pid, signal.SIGKILL)
            return None
        case "stop":
            os.kill(pid, signal.SIGSTOP)
            return until, lambda: _wake(pid)
        case "outage":
            world.server.kill()
            return until, world.server.start
        case "full disk":
            pids = list(ranks.values())
            _limit_files(pids, SMALL_FILES)
            return until, lambda: _limit_files(pids, resource.RLIM_INFINITY)
        case "full /dev/shm":
            return until, _fill_shared_memory(pid)
        case "second start":
            world.seconds.append(
                subprocess.Popen(
                    world.second,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            return time.monotonic() + SECOND_S, world.seconds[-1].kill
        case switched:
            switch = world.switch(switched)
            switch.touch()
            return until, lambda: switch.unlink(missing_ok=True)


def _wake(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _limit_files(pids: list[int], most: int) -> None:
    """Limits the size of files that some processes may write."""
    for pid in pids:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def _fill_shared_memory(pid: int) -> Callable[[], None]:
    """Fills the /dev/shm that a process sees, if it is its own; returns what empties it."""
    theirs = Path(f"/proc/{pid}/root/dev/shm")
    if theirs.stat().st_dev == Path("/dev/shm").stat().st_dev:
        return lambda: None  # everybody's
    # An open descriptor outlives the process that showed the way.
    folder = os.open(theirs, os.O_RDONLY)
    file = os.open("full", os.O_WRONLY | os.O_CREAT, dir_fd=folder)
    with suppress(OSError):
        os.posix_fallocate(file, 0, shutil.disk_usage(folder).free)

    def empty() -> None:
        os.close(file)
        os.unlink("full", dir_fd=folder)
        os.close(folder)

    return empty
