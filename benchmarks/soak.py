"""A long run on two processes in bad luck: does it end, with every sample, and without growing?

    python benchmarks/soak.py [--steps 2000] [--seed 0]

One `torchrun --max-restarts` of `debug` with `--resume auto`, on images of which some are broken,
recorded by a real MLflow server. At steps drawn from the seed a rank is killed (`kill -9`) or
stands still for some seconds (SIGSTOP), the server dies and comes back, or the disk takes no file
of more than some kilobytes for a while. The last 40 % are without kills: there the memory and the
open files of each rank have to stay where they are.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.kill import ranks_of  # noqa: E402
from harness.jobs import arguments, lines, write_images  # noqa: E402
from seer_scale.data import MultiCrop, build_loader, open_source  # noqa: E402
from seer_scale.distributed.ports import free_port  # noqa: E402

PER_2000 = {"kill": 8, "stop": 8, "outage": 6, "full disk": 6}
CALM_FROM = 0.6  # of the steps: no kills from there on
SMALL_FILES = 20_000  # bytes
POLL_S = 0.1
PATIENCE_S = 300.0  # without a step
GROWTH = 0.05  # of the memory, over the last 40 %
BATCH = 8


@dataclass
class Watch:
    """Resident bytes and open files of one process, over its life."""

    steps: list[int] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def look(self, pid: int, step: int) -> None:
        """Takes a sample."""
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        self.steps.append(step)
        self.rss.append(pages * resource.getpagesize())
        self.files.append(len(os.listdir(f"/proc/{pid}/fd")))


def schedule(steps: int, seed: int) -> list[tuple[int, str]]:
    """(step, fault), in order."""
    rng = random.Random(seed)
    found = []
    for fault, count in PER_2000.items():
        for _ in range(max(1, round(count * steps / 2000))):
            last = CALM_FROM if fault == "kill" else 0.95
            found.append((rng.randrange(steps // 50 + 1, int(last * steps)), fault))
    return sorted(found)


def last_step(run_dir: Path) -> int:
    """Of metrics.jsonl, from its last bytes."""
    try:
        tail = (run_dir / "metrics.jsonl").read_bytes()[-4000:].splitlines()
        return int(tail[-2 if len(tail) > 1 else -1].split(b'"step": ')[1].split(b",")[0])
    except (OSError, IndexError, ValueError):
        return 0


class MlflowServer:
    """A server that can die and come back."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, without waiting."""
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
        """Ends it at once."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            with suppress(OSError), urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return
            time.sleep(0.2)
        raise TimeoutError("the MLflow server does not come up")


def limit_files(pids: list[int], most: int) -> None:
    """How large a file these processes may write."""
    for pid in pids:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def wake(pid: int) -> None:
    """Lets a process that stands still go on."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def do(
    fault: str, workers: dict[int, int], server: MlflowServer, rng: random.Random
) -> tuple[float, Callable[[], None]] | None:
    """Does a fault; when and how it is over, if it is not at once."""
    rank = rng.choice(sorted(workers))
    if fault == "kill":
        os.kill(workers[rank], signal.SIGKILL)
        return None
    seconds = time.monotonic() + rng.uniform(1, 5)
    if fault == "stop":
        pid = workers[rank]
        os.kill(pid, signal.SIGSTOP)
        return seconds, lambda: wake(pid)
    if fault == "outage":
        server.kill()
        return seconds, server.start
    pids = list(workers.values())
    limit_files(pids, SMALL_FILES)
    return seconds, lambda: limit_files(pids, resource.RLIM_INFINITY)


def soak(
    process: subprocess.Popen[bytes],
    run_dir: Path,
    server: MlflowServer,
    steps: int,
    seed: int,
) -> tuple[Counter[str], dict[int, Watch]]:
    """Disturbs a run until it ends; the faults, and what its processes held."""
    rng, todo = random.Random(seed + 1), schedule(steps, seed)
    later: list[tuple[float, Callable[[], None]]] = []
    done: Counter[str] = Counter()
    watched: defaultdict[int, Watch] = defaultdict(Watch)
    furthest, moved = 0, time.monotonic()
    while process.poll() is None:
        step, now = last_step(run_dir), time.monotonic()
        if step != furthest:
            furthest, moved = step, now
        if now - moved > PATIENCE_S:
            raise TimeoutError(f"the run stands still after step {step}")
        for entry in [entry for entry in later if entry[0] <= now]:
            entry[1]()
            later.remove(entry)
        workers = ranks_of(process.pid)
        if todo and step >= todo[0][0] and len(workers) == 2:
            fault = todo.pop(0)[1]
            with suppress(ProcessLookupError):
                if over := do(fault, workers, server, rng):
                    later.append(over)
                done[fault] += 1
                print(f"step {step}: {fault}", flush=True)
        if step >= CALM_FROM * steps:
            for pid in workers.values():
                with suppress(OSError):
                    watched[pid].look(pid, step)
        time.sleep(POLL_S)
    for _, over_now in later:
        over_now()
    return done, watched


def growth(watched: dict[int, Watch]) -> tuple[float, int, int]:
    """Over the last 40 % of the steps, of the process that grew most.

    Returns:
        memory: of the last fifth of its samples over the third fifth's, minus 1: the allocator
            takes some hundred steps to settle.
        files: most open ones at the end, minus those of the beginning.
        samples: that were looked at.
    """
    found = []
    for watch in watched.values():
        fifth = len(watch.rss) // 5
        if fifth >= 3:
            early, late = slice(2 * fifth, 3 * fifth), slice(-fifth, None)
            rss = statistics.median(watch.rss[late]) / statistics.median(watch.rss[early]) - 1
            files = statistics.median(watch.files[late]) - statistics.median(watch.files[early])
            found.append((rss, int(files), len(watch.rss)))
    return max(found, default=(float("inf"), 0, 0))


def expected_samples(images: Path, steps: int) -> list[list[int]]:
    """The ids of every global batch, from the loader alone."""
    loader = build_loader(
        open_source(str(images)),
        MultiCrop([32], [2], [(0.3, 1.0)]),
        seed=0,
        micro_batch_size=BATCH,
        workers=0,
    )
    with loader:
        return [next(loader).sample_ids.tolist() for _ in range(steps)]


def recorded_steps(server: MlflowServer, run_id: str) -> set[int]:
    """Steps whose loss MLflow has."""
    from mlflow import MlflowClient

    client = MlflowClient(f"http://127.0.0.1:{server.port}")
    return {metric.step for metric in client.get_metric_history(run_id, "loss")}


def main() -> int:
    """Prints every fault and the verdict; 1 if the run did not outlive them unharmed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, run_dir, log = write_images(folder / "images"), folder / "run", folder / "log"
        for number in range(3):
            (images / "class0" / f"broken{number}.jpg").write_bytes(b"<html>" * number)
        server = MlflowServer(folder)
        server.start()
        argv = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(free_port()), "--max-restarts", "1000"),
            *("--monitor-interval", "0.2", str(ROOT / "launch" / "pretrain.py")),
            *arguments(
                images,
                run_dir,
                f"tracking.uri=http://127.0.0.1:{server.port}",
                *(f"train.steps={given.steps}", "checkpoint.every=20", "optim.base_lr=0.01"),
                *("run.log_samples=true", "tracking.log_models=false", "--resume", "auto"),
            ),
        ]
        began = time.monotonic()
        try:
            with (
                log.open("wb") as output,
                subprocess.Popen(argv, env=environment, stdout=output, stderr=output) as process,
            ):
                try:
                    done, watched = soak(process, run_dir, server, given.steps, given.seed)
                finally:
                    process.kill()
            seconds = time.monotonic() - began
            server.start()
            server.wait()
            sync = [sys.executable, str(ROOT / "launch" / "sync.py"), str(run_dir)]
            sent = subprocess.run(
                sync, env=environment, capture_output=True, text=True, check=False
            )
            run_id = sent.stdout.split()[-1] if sent.returncode == 0 else ""
            recorded = recorded_steps(server, run_id) if run_id else set()
        finally:
            server.kill()
        memory, files, looks = growth(watched)
        text = log.read_text(errors="replace")
        everything = set(range(1, given.steps + 1))
        samples = {line["step"]: line["samples"] for line in lines(run_dir, "samples.jsonl")}
        wanted = dict(enumerate(expected_samples(images, given.steps), start=1))
        # A disk that takes nothing may cost lines of the records, never a sample.
        wrong = [step for step, ids in samples.items() if wanted[step] != ids]
        lost = len(everything - samples.keys())
        checks = {
            f"exit status {process.returncode}": process.returncode == 0,
            f"{len(samples)} steps with samples recorded, {lost} lost to the full disk": lost
            <= given.steps // 20,
            f"{len(wrong)} steps with other samples than undisturbed": not wrong,
            f"{len(recorded)} steps in MLflow": len(everything - recorded) <= given.steps // 20,
            f"memory of a rank {100 * memory:+.1f} % over the last 40 % ({looks} looks)": memory
            < GROWTH,
            f"open files of a rank {files:+d}": files <= 2,
        }
        print(
            f"{given.steps} steps in {seconds:.0f} s, {sum(done.values())} faults ("
            f"{', '.join(f'{count} x {fault}' for fault, count in sorted(done.items()))}), "
            f"{text.count('was not written')} failed saves in the log"
        )
        for check, good in checks.items():
            print(f"  {'ok  ' if good else 'BAD '} {check}")
        if not all(checks.values()):
            print(text[-5000:], file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
