"""Checks that a long run with faults ends, sees every sample and does not grow in memory.

    make soak
    python benchmarks/soak.py [--steps 2000] [--seed 0]

Starts one `torchrun --max-restarts` of `debug` on two processes with `--resume auto`, on images of
which some are broken, recorded by a real MLflow server, with docker's 64 MB of /dev/shm. At steps
drawn from the seed, a rank is killed (`kill -9`) or stopped for some seconds (SIGSTOP), the server
dies and comes back, somebody starts the same run again, or for a while the disk refuses files of
more than some kilobytes, /dev/shm is full, files have no locks, or images do not come. The last
40 % have no kills: there the memory and the open files of each rank must stay constant. Results are
printed. `soak_faults` has the faults.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.kill import ranks_of  # noqa: E402
from benchmarks.soak_faults import (  # noqa: E402
    CALM_FROM,
    MlflowServer,
    World,
    cause,
    schedule,
    small_shared_memory,
)
from harness.jobs import arguments, lines, write_images  # noqa: E402
from seer_scale.data import MultiCrop, build_loader, open_source  # noqa: E402
from seer_scale.distributed.ports import free_port  # noqa: E402

POLL_S = 0.1
PATIENCE_S = 300.0  # longest time without a step
GROWTH = 0.05  # allowed growth of memory over the last 40 % of the steps
BATCH = 8


@dataclass
class Watch:
    """Records resident bytes and open files of one process over its life."""

    steps: list[int] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def look(self, pid: int, step: int) -> None:
        """Takes a sample of memory and open files."""
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        self.steps.append(step)
        self.rss.append(pages * resource.getpagesize())
        self.files.append(len(os.listdir(f"/proc/{pid}/fd")))


def last_step(run_dir: Path) -> int:
    """Last step in metrics.jsonl, from the last bytes of the file."""
    try:
        tail = (run_dir / "metrics.jsonl").read_bytes()[-4000:].splitlines()
        return int(tail[-2 if len(tail) > 1 else -1].split(b'"step": ')[1].split(b",")[0])
    except (OSError, IndexError, ValueError):
        return 0


def soak(
    process: subprocess.Popen[bytes],
    run_dir: Path,
    world: World,
    steps: int,
    seed: int,
) -> tuple[Counter[str], dict[int, Watch]]:
    """Disturbs a run until it ends; returns the faults and the memory of its processes."""
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
        # A second start must find the run alive.
        calm = not world.look_at_seconds()
        if todo and step >= todo[0][0] and len(workers) == 2 and calm:
            fault = todo.pop(0)[1]
            with suppress(ProcessLookupError, FileNotFoundError):
                if over := cause(fault, workers, world, rng):
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
    for process_left in world.seconds:
        process_left.wait()
    world.look_at_seconds()
    return done, watched


def growth(watched: dict[int, Watch]) -> tuple[float, int, int]:
    """Growth of the process that grew most over the last 40 % of the steps.

    Returns:
        memory: resident memory of the last fifth of the samples over that of the third fifth,
            minus 1; the allocator takes some hundred steps to settle.
        files: most open files at the end minus those at the beginning.
        samples: number of samples.
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
    """Lists the sample ids of every global batch, from the loader alone."""
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
    """Lists the steps whose loss is in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(f"http://127.0.0.1:{server.port}")
    return {metric.step for metric in client.get_metric_history(run_id, "loss")}


def main() -> int:
    """Prints every fault and the verdict; returns 1 if a fault did harm to the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, run_dir, log = write_images(folder / "images"), folder / "run", folder / "log"
        for number in range(3):
            (images / "class0" / f"broken{number}.jpg").write_bytes(b"<html>" * number)
        server = MlflowServer(folder)
        server.start()
        job = [
            str(ROOT / "launch" / "pretrain.py"),
            *arguments(
                images,
                run_dir,
                f"tracking.uri=http://127.0.0.1:{server.port}",
                *(f"train.steps={given.steps}", "checkpoint.every=20", "optim.base_lr=0.01"),
                *("run.log_samples=true", "tracking.log_models=false", "--resume", "auto"),
            ),
        ]
        argv = [
            *small_shared_memory(),
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(free_port()), "--max-restarts", "1000"),
            *("--monitor-interval", "0.2", *job),
        ]
        world = World(folder, server, [sys.executable, *job])
        environment = world.environment()
        began = time.monotonic()
        try:
            with (
                log.open("wb") as output,
                subprocess.Popen(argv, env=environment, stdout=output, stderr=output) as process,
            ):
                try:
                    done, watched = soak(process, run_dir, world, given.steps, given.seed)
                finally:
                    process.kill()
            seconds = time.monotonic() - began
            server.start()
            server.wait()
            sync = [sys.executable, str(ROOT / "launch" / "sync.py"), str(run_dir)]
            sent = subprocess.run(sync, capture_output=True, text=True, check=False)
            run_id = sent.stdout.split()[-1] if sent.returncode == 0 else ""
            recorded = recorded_steps(server, run_id) if run_id else set()
        finally:
            server.kill()
        memory, files, looks = growth(watched)
        text = log.read_text(errors="replace")
        everything = set(range(1, given.steps + 1))
        samples = {line["step"]: line["samples"] for line in lines(run_dir, "samples.jsonl")}
        wanted = dict(enumerate(expected_samples(images, given.steps), start=1))
        # A full disk may lose lines of the records, but never a sample.
        wrong = [step for step, ids in samples.items() if wanted[step] != ids]
        lost = len(everything - samples.keys())
        checks = {
            f"exit status {process.returncode}": process.returncode == 0,
            f"{len(samples)} steps with samples recorded, {lost} lost to the full disk": lost
            <= given.steps // 20,
            f"{len(wrong)} steps with other samples than undisturbed": not wrong,
            f"{len(recorded)} steps in MLflow; {sent.stdout.strip()} {sent.stderr.strip()}": len(
                everything - recorded
            )
            <= given.steps // 20,
            f"memory of a rank {100 * memory:+.1f} % over the last 40 % ({looks} looks)": memory
            < GROWTH,
            f"open files of a rank {files:+d}": files <= 2,
            f"{len(world.refused)} second starts, {sum(world.refused)} refused in a sentence": (
                sum(world.refused) == len(world.refused) == done["second start"]
            ),
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
