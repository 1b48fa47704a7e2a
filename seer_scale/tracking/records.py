"""What a run leaves in its folder: config.yaml, metrics.jsonl, samples.jsonl, curve.png.

Rank 0 writes. A resumed run first drops the lines of steps that it is about to do again.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
BAD_SAMPLES = "bad_samples.jsonl"
EVALUATED = "eval/knn_top1"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    objects = []
    for line in path.read_text().splitlines():
        try:
            objects.append(json.loads(line))
        except ValueError:
            break
    return objects


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines after `step`, through a new file: a kill must not lose the old lines."""
    if path.exists():
        lines = [json.dumps(entry) + "\n" for entry in read_lines(path) if entry["step"] <= step]
        fresh = path.with_suffix(".rewritten")
        fresh.write_text("".join(lines))
        fresh.replace(path)


class Records:
    """Appends one JSON object per step to each file; whole lines, flushed as they come.

    A disk that takes nothing costs a warning and lines, not the run; `close` still tries.
    """

    def __init__(self, run_dir: Path, *, first_step: int, log_samples: bool) -> None:
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, SAMPLES, BAD_SAMPLES):
            _keep_until(run_dir / name, first_step)
        self._metrics = (run_dir / METRICS).open("a", buffering=1)
        self._samples: TextIO | None = None
        if log_samples:
            self._samples = (run_dir / SAMPLES).open("a", buffering=1)
        self._warned = False

    @contextmanager
    def _outliving_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                warnings.warn(f"records of {self.run_dir} are lost: {error}", stacklevel=4)
            self._warned = True

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl: of the step itself, or of an evaluation after it."""
        with self._outliving_the_disk():
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")

    def samples(self, step: int, ids: list[int]) -> None:
        """One line of samples.jsonl, if it is kept: the ids of the global batch."""
        if self._samples is not None:
            with self._outliving_the_disk():
                self._samples.write(json.dumps({"step": step, "samples": ids}) + "\n")

    def bad_samples(self, step: int, bad: Sequence[tuple[str, str]]) -> None:
        """One line of bad_samples.jsonl per image that was replaced."""
        if bad:
            path = self.run_dir / BAD_SAMPLES
            with self._outliving_the_disk(), path.open("a") as file:
                for name, cause in bad:
                    file.write(json.dumps({"step": step, "name": name, "cause": cause}) + "\n")

    def best_evaluation(self) -> float:
        """The highest kNN top-1 so far; minus infinity before the first."""
        lines = read_lines(self.run_dir / METRICS)
        return max((line[EVALUATED] for line in lines if EVALUATED in line), default=-math.inf)

    def draw_curve(self) -> None:
        """Draws `curve.png` from what is there so far."""
        with self._outliving_the_disk():
            draw_curve(self.run_dir)

    def close(self) -> None:
        """Closes the files and draws the curve."""
        for file in filter(None, (self._metrics, self._samples)):
            with self._outliving_the_disk():
                file.close()
        self.draw_curve()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def draw_curve(run_dir: Path) -> Path | None:
    """Draws loss, learning rate and the objective's health over the steps to `curve.png`."""
    everything = read_lines(run_dir / METRICS)
    lines = [line for line in everything if "loss" in line]  # others are of evaluations
    if not lines:
        return None
    from matplotlib.figure import Figure  # half a second: only who draws pays for it

    steps = [line["step"] for line in lines]
    panels = [("loss", "loss"), ("lr", "learning rate"), ("images_per_second", "images / s")]
    health = [
        key
        for key in ("loss_over_ln_k", "prototype_usage_entropy", "embedding_std")
        if key in lines[-1]
    ]
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for axis, (key, title) in zip(axes, panels, strict=False):
        axis.plot(steps, [line.get(key) for line in lines], linewidth=1, color="#0072b2")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    styles = [("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", ":")]
    for key, (colour, style) in zip(health, styles, strict=False):
        values = [line.get(key) for line in lines]
        axes[3].plot(steps, values, style, linewidth=1.2, color=colour, label=key)
    evaluated = [line for line in everything if EVALUATED in line]
    if evaluated:
        values = [line[EVALUATED] for line in evaluated]
        axes[3].plot([line["step"] for line in evaluated], values, "k.-", label="kNN top-1")
    axes[3].set(title="objective", xlabel="step")
    axes[3].grid(alpha=0.3)
    if health or evaluated:
        axes[3].legend()
    figure.suptitle(run_dir.name)
    path = run_dir / "curve.png"
    figure.savefig(path, dpi=110)
    return path
