"""How long a save holds up the training: asynchronous against blocking, at regnety_16gf's size.

    python benchmarks/stall.py [--trunk regnety_16gf] [--write]

One process on the CPU trains the plain model. The delay of an asynchronous save is all the time by
which the steps until its end took longer than as many undisturbed ones, the copy included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import record  # noqa: E402
from seer_scale.checkpoint import Saver  # noqa: E402
from seer_scale.models import build_model, initialise  # noqa: E402
from seer_scale.optim import SliceSGD, parameter_groups  # noqa: E402

STEPS_OF_A_SAVE = 8  # at least; the delay is looked for in all steps until the save's end


class Training:
    """Steps of a model and its optimizer on random images, and saves of them."""

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
        """Seconds of one step."""
        began = time.perf_counter()
        _, scores = self.model(self.crops)
        scores.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        return time.perf_counter() - began

    def save(self, *, urgent: bool) -> float:
        """Starts a save; seconds until the training may go on."""
        began = time.perf_counter()
        self.saver.save(
            step=self.step_number,
            slices=self.optimizer.slices(),
            writes_slices=True,
            model=self.model,
            local_state={},
            manifest={},
            urgent=urgent,
        )
        return time.perf_counter() - began


def measure(training: Training, repeats: int) -> list[dict[str, float]]:
    """Alternately undisturbed steps, an asynchronous save among steps, and a blocking save."""
    for _ in range(3):
        training.step()
    training.save(urgent=True)  # takes the host memory that later ones reuse
    training.saver.wait()
    training.saver.outcomes()
    found = []
    for _ in range(repeats):
        usual = statistics.fmean(training.step() for _ in range(STEPS_OF_A_SAVE))
        stall = training.save(urgent=False)
        seconds: list[float] = []
        while True:
            seconds.append(training.step())
            outcomes = training.saver.outcomes()
            if outcomes and len(seconds) >= STEPS_OF_A_SAVE:
                break
            for outcome in outcomes:
                assert outcome.problem is None, outcome.problem
        after = statistics.fmean(training.step() for _ in range(STEPS_OF_A_SAVE))
        usual = (usual + after) / 2
        began = time.perf_counter()
        training.save(urgent=True)
        training.saver.wait()
        blocking = time.perf_counter() - began
        training.saver.outcomes()
        delay = stall + sum(seconds) - usual * len(seconds)
        found.append(
            {
                "step": usual,
                "copy": stall,
                "steps_meanwhile": len(seconds),
                "delay": delay,
                "blocking": blocking,
                "share": delay / blocking,
            }
        )
        print({key: round(value, 3) for key, value in found[-1].items()}, file=sys.stderr)
    return found


def main() -> int:
    """Prints the table; 1 if the delay is a tenth of a blocking save or more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trunk", default="regnety_16gf")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, help="of the training; else torch's default")
    parser.add_argument("--folder", default=str(ROOT / "runs"), help="on the disk to be measured")
    parser.add_argument("--write", action="store_true", help="into docs/checkpoints.md")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    Path(given.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        training = Training(given.trunk, Path(folder), batch=given.batch, size=given.size)
        found = measure(training, given.repeats)
    middle = {key: statistics.median(case[key] for case in found) for key in found[0]}
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    rows = [
        ["parameters", f"{parameters / 1e6:.1f} M, {parameters * 8 / 2**30:.2f} GiB with momentum"],
        ["a step without a save", f"{middle['step']:.2f} s"],
        ["blocking save", f"{middle['blocking']:.2f} s"],
        ["asynchronous save: copy", f"{middle['copy']:.2f} s"],
        ["asynchronous save: delay of all steps, copy included", f"{middle['delay']:.2f} s"],
        ["delay, as a share of the blocking save", f"{middle['share']:.1%}"],
    ]
    header = [f"{given.trunk}, medians of {given.repeats}", ""]
    where = record.in_words(record.environment())
    text = f"{record.markdown(header, rows)}\n{where}, {torch.get_num_threads()} threads"
    print(text)
    if given.write:
        record.save("stall", "python benchmarks/stall.py", {"cases": found})
        record.put_into(ROOT / "docs" / "checkpoints.md", "stall", text)
    return int(middle["share"] >= 0.1)


if __name__ == "__main__":
    sys.exit(main())
