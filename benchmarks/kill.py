"""Kills random ranks of a run again and again, and checks that the run loses no sample.

    make kill
    python benchmarks/kill.py [--kills 20] [--steps 600]

Starts one `torchrun --max-restarts` with `--resume auto`. A third of the kills comes in the middle
of a save, a third at any moment (start-up included), a third after some steps. At the end the
ordered sample ids and the losses must equal those of an undisturbed run. Results are printed; the
exit status is 1 if they differ.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.jobs import arguments, lines, write_images  # noqa: E402
from seer_scale.distributed.ports import free_port  # noqa: E402

PATIENCE_S = 300.0
MOMENTS = ("saving", "any", "training")


def command(images: Path, run_dir: Path, *, steps: int, ranks: int, restarts: int) -> list[str]:
    """Command of a run under torchrun that resumes by itself."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
        *("--master-port", str(free_port()), "--max-restarts", str(restarts)),
        *("--monitor-interval", "0.2", str(ROOT / "launch" / "pretrain.py")),
        *arguments(images, run_dir, f"train.steps={steps}", "run.log_samples=true"),
        *("checkpoint.every=7", "optim.base_lr=0.05", "--resume", "auto"),
    ]


def ranks_of(launcher: int) -> dict[int, int]:
    """Finds the launcher's workers: rank -> process id."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for entry in environment:
            if entry.startswith(b"RANK="):
                found[int(entry[5:])] = int(pid)
    return found


def steps_done(run_dir: Path) -> int:
    """Last step in the run's records."""
    try:
        return int(lines(run_dir)[-1]["step"])
    except (FileNotFoundError, IndexError, ValueError):
        return 0


def saving(run_dir: Path) -> bool:
    """Whether a checkpoint is being written now."""
    return any((run_dir / "checkpoints").glob(".step_*.partial/rank_*"))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Waits for a condition; returns False if the run ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError("the run did not get on")
        time.sleep(0.002)
    return True


def kill_one(
    process: subprocess.Popen[bytes], run_dir: Path, moment: str, rng: random.Random
) -> str | None:
    """Waits for a moment and kills a rank; says what was done, or None if the run has ended."""
    if not wait_until(lambda: len(ranks_of(process.pid)) > 0, process):
        return None
    before = steps_done(run_dir)
    if moment == "any":
        time.sleep(rng.uniform(0, 15))
    else:
        if not wait_until(lambda: steps_done(run_dir) > before, process):
            return None
        time.sleep(rng.uniform(0, 2))
        if moment == "saving" and not wait_until(lambda: saving(run_dir), process):
            return None
    workers = ranks_of(process.pid)
    if not workers:
        return None
    rank = rng.choice(sorted(workers))
    mid_save = saving(run_dir)
    os.kill(workers[rank], signal.SIGKILL)
    gone = workers[rank]
    wait_until(lambda: gone not in ranks_of(process.pid).values(), process)
    return f"rank {rank} after step {steps_done(run_dir)} ({moment}{', in a save' * mid_save})"


def main() -> int:
    """Prints every kill and the verdict; returns 1 if samples or losses differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images")
        whole, run_dir = folder / "whole", folder / "killed"
        common = {"steps": given.steps, "ranks": given.ranks}
        undisturbed = command(images, whole, restarts=0, **common)
        subprocess.run(undisturbed, env=environment, check=True, stderr=subprocess.DEVNULL)
        log = (folder / "log").open("wb")
        argv = command(images, run_dir, restarts=given.kills + 5, **common)
        began = time.monotonic()
        with subprocess.Popen(argv, env=environment, stderr=log, stdout=log) as process:
            while len(killed) < given.kills:
                moment = MOMENTS[len(killed) % len(MOMENTS)]
                what = kill_one(process, run_dir, moment, rng)
                if what is None:
                    break
                killed.append(what)
                print(f"{len(killed)}: {what}", flush=True)
            status = process.wait()
        log.close()
        seconds = time.monotonic() - began
        if status != 0:
            print((folder / "log").read_text()[-5000:], file=sys.stderr)
        samples = [lines(run, "samples.jsonl") for run in (whole, run_dir)]
        losses = [[line["loss"] for line in lines(run)] for run in (whole, run_dir)]
    same = samples[0] == samples[1]
    mid_save = sum("in a save" in what for what in killed)
    print(
        f"{len(killed)} of {given.kills} kills, {mid_save} of them in a save, {seconds:.0f} s; "
        f"exit status {status}; sample ids {'equal' if same else 'DIFFERENT'}, "
        f"losses {'equal bit for bit' if losses[0] == losses[1] else 'DIFFERENT'}"
    )
    return int(not (same and status == 0 and losses[0] == losses[1]))


if __name__ == "__main__":
    sys.exit(main())
