"""Measures how long a save delays the training: asynchronous saves beside blocking ones.

    make stall
    python benchmarks/stall.py [--trunk regnety_16gf] [--write]

One process on the CPU trains the plain model. The delay of an asynchronous save is the extra time
of all steps until the save ends, the copy included, compared with as many undisturbed steps. With
one core left free, as training on a GPU leaves many, and with training on all cores: there the
disk's own work counts too, where a hypervisor does it with this machine's processors (steal).
`--write` puts the results into benchmarks/results/ and docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.stats
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import record  # noqa: E402
from seer_scale.checkpoint import Saver  # noqa: E402
from seer_scale.models import build_model, initialise  # noqa: E402
from seer_scale.optim.groups import parameter_groups  # noqa: E402
from seer_scale.optim.slice_sgd import SliceSGD  # noqa: E402
from seer_scale.performance.host_memory import keep_freed_memory  # noqa: E402

STEPS_OF_A_WINDOW = 3  # minimum; a save's window lasts until the files are on the disk
TRIMMED = 0.1


class Training:
    """A model and its optimizer on random images: steps, and saves."""

    def __init__(self, trunk: str, root: Path, *, batch: int, size: int) -> None:
        self.model = build_model(trunk, head_dims=[256, 64], head_batch_norm=False, prototypes=300)
        initialise(self.model, 0)
        self.model.train()
        groups = parameter_groups(self.model, unit_rows=frozenset())
        self.optimizer = SliceSGD(groups, momentum=0.9, weight_decay=1e-5, trust_coefficient=1e-3)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3
        self.crops = [torch.randn(batch, 3, size, size)]
        self.saver = Saver(root, trunk=trunk, keep=1)
        self.step_number = 0

    def step(self) -> float:
        """Takes one step; returns its seconds."""
        began = time.perf_counter()
        _, scores = self.model(self.crops)
        scores.square().mean().backward()
        self.saver.before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        return time.perf_counter() - began

    def window(self) -> float:
        """Takes several steps; returns their seconds."""
        return sum(self.step() for _ in range(STEPS_OF_A_WINDOW))

    def save(self, *, urgent: bool) -> float:
        """Starts a save; returns the seconds until the training may go on."""
        self.step_number += 1  # two checkpoints of one step would both be kept
        began = time.perf_counter()
        self.saver.save(
            step=self.step_number,
            slices=self.optimizer.slices(),
            model=self.model,
            local_state={},
            manifest={},
            in_place=True,
            urgent=urgent,
        )
        return time.perf_counter() - began


def measure(training: Training, repeats: int) -> list[dict[str, float]]:
    """Measures windows of steps, in turn undisturbed and with a save; then a blocking save.

    A window with a save is compared with the mean of the undisturbed windows before and after it,
    so that a machine that slowly gets slower cancels out. A window lasts as long as a save: later
    steps would only add noise.
    """
    for _ in range(3):
        training.step()
    training.save(urgent=True)  # allocates the host memory that later saves reuse
    training.saver.wait()
    training.saver.outcomes()
    found: list[dict[str, float]] = []
    undisturbed = [training.window()]
    for _ in range(repeats):
        stolen = stolen_seconds()
        stall = training.save(urgent=False)
        seconds = training.window()
        steps = STEPS_OF_A_WINDOW
        while not (outcomes := training.saver.outcomes()):
            seconds += training.step()
            steps += 1
        assert outcomes[0].problem is None, outcomes[0].problem
        stolen = stolen_seconds() - stolen
        undisturbed.append(training.window())
        usual = sum(undisturbed[-2:]) / (2 * STEPS_OF_A_WINDOW)
        began = time.perf_counter()
        training.save(urgent=True)
        training.saver.wait()
        blocking = time.perf_counter() - began
        training.saver.outcomes()
        found.append(
            {
                "step": usual,
                "copy": stall,
                "writing": outcomes[0].seconds,
                "steps": steps,
                "stolen": stolen,
                "delay": stall + seconds - usual * steps,
                "blocking": blocking,
            }
        )
        print({key: round(value, 3) for key, value in found[-1].items()}, file=sys.stderr)
    return found


def delay_of(found: list[dict[str, float]]) -> tuple[float, float]:
    """Mean delay and its standard error in seconds, without the largest and smallest tenths.

    On a shared machine, one window differs from the next by more than the delay, so only the mean
    of many windows tells it. The tenths that are left out are windows that other tenants disturbed.
    """
    delays = np.array([case["delay"] for case in found])
    mean = scipy.stats.trim_mean(delays, TRIMMED)
    return float(mean), float(scipy.stats.mstats.trimmed_stde(delays, (TRIMMED, TRIMMED)))


def stolen_seconds() -> float:
    """Processor seconds of all cores so far that the hypervisor gave to other machines."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


def column(found: list[dict[str, float]]) -> tuple[list[str], float]:
    """Makes a column of the table; also returns the delay as a share of a blocking save."""
    middle = {key: statistics.median(case[key] for case in found) for key in found[0]}
    delay, error = delay_of(found)
    share = delay / middle["blocking"]
    cells = [
        str(len(found)),
        f"{middle['step']:.2f} s",
        f"{middle['blocking']:.2f} s",
        f"{middle['writing']:.2f} s",
        f"{middle['stolen']:.2f} s",
        f"{middle['copy']:.2f} s",
        f"{delay:.2f} ± {error:.2f} s",
        f"{share:.1%}",
    ]
    return cells, share


ROWS = (
    "saves of each kind",
    "a step without a save",
    "blocking save",
    "asynchronous save, from its call to the whole file",
    "processor time that the virtual disk took meanwhile",
    "asynchronous save: copy",
    "delay of all steps, copy included",
    "delay, as a share of the blocking save",
)


def main() -> int:
    """Prints the table; returns 1 if the delay with a free core is >= 10 % of a blocking save."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trunk", default="regnety_16gf")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument(
        "--batch", type=int, default=8, help="images per step; a step must be longer than a save"
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[max(1, cores - 1), cores])
    parser.add_argument(
        "--folder", default=str(ROOT / "runs"), help="folder on the disk to measure"
    )
    parser.add_argument("--write", action="store_true", help="write into docs/checkpoints.md")
    given = parser.parse_args()
    Path(given.folder).mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as launch/pretrain.py does
    cases = {}
    for threads in given.threads:
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            training = Training(given.trunk, Path(folder), batch=given.batch, size=given.size)
            # On all cores a save takes many steps.
            repeats = given.repeats if threads < cores else max(2, given.repeats // 4)
            cases[threads] = measure(training, repeats)
    columns, shares = zip(*(column(found) for found in cases.values()), strict=True)
    header = [given.trunk, *(f"{threads} of {cores} cores" for threads in cases)]
    rows = [list(row) for row in zip(ROWS, *columns, strict=True)]
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    text = (
        f"{record.markdown(header, rows)}\n"
        f"{parameters / 1e6:.1f} M parameters, {parameters * 8 / 2**30:.2f} GiB with momentum and "
        f"{parameters * 4 / 2**30:.2f} GiB of trunk beside it. Medians; the delay is a mean "
        "without the outermost tenths, with its standard error. "
        f"{record.in_words(record.environment())}."
    )
    print(text)
    if given.write:
        record.save("stall", "python benchmarks/stall.py", {"cases_by_threads": cases})
        record.put_into(ROOT / "docs" / "checkpoints.md", "stall", text)
    return int(shares[0] >= 0.1)


if __name__ == "__main__":
    sys.exit(main())
