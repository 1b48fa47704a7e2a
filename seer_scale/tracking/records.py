"""Files of a run: metrics.jsonl, samples.jsonl, bad_samples.jsonl and curve.png.

Rank 0 writes. A resumed run first drops the lines of the steps that it repeats. The curve is drawn
by a process of its own: python -m seer_scale.tracking.records RUN_DIR
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from seer_scale.storage.atomic import replaced_file
from seer_scale.tracking.children import package_environment

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
BAD_SAMPLES = "bad_samples.jsonl"
EVALUATED = "eval/knn_top1"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a JSON-lines file, without a last line that was cut off."""
    if not path.exists():
        return []
    objects = []
    for line in path.read_text().splitlines():
        try:
            objects.append(json.loads(line))
        except ValueError:
            break
    return objects


def keep_knn(run_dir: Path, step: int, result: Mapping[str, Any]) -> None:
    """Writes the k-NN result of the trunk of `step` into the run, for its model card.

    Args:
        run_dir: folder of the run.
        step: step of the evaluated checkpoint.
        result: `top1`, and what it was measured on.
    """
    path = _knn_file(run_dir, step)
    path.parent.mkdir(exist_ok=True)
    with replaced_file(path, writers=2) as fresh:
        fresh.write_text(json.dumps(result) + "\n")


def read_knn(run_dir: Path, step: int) -> dict[str, Any] | None:
    """Reads the k-NN result of the trunk of `step`: of `evaluate`, else of the training."""
    return kept_knn(run_dir, step) or trained_knn(run_dir).get(step)


def kept_knn(run_dir: Path, step: int) -> dict[str, Any] | None:
    """Reads what `keep_knn` wrote for the trunk of `step`."""
    return next(iter(read_lines(_knn_file(run_dir, step))), None)


def trained_knn(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Reads the k-NN results of the training itself, by step."""
    found: dict[int, dict[str, Any]] = {}
    for line in read_lines(run_dir / METRICS):
        if EVALUATED in line:
            found.setdefault(line["step"], {"top1": line[EVALUATED]})
    return found


def _knn_file(run_dir: Path, step: int) -> Path:
    return run_dir / "eval" / f"knn_step_{step:08d}.json"


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines after `step`; a kill does not lose the old lines."""
    if path.exists():
        lines = [json.dumps(entry) + "\n" for entry in read_lines(path) if entry["step"] <= step]
        with replaced_file(path) as fresh:
            fresh.write_text("".join(lines))


class Records:
    """Appends one JSON object per step to each file, and flushes every line.

    A full disk costs a warning and lines, not the run; `close` tries again.
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
        self._drawing: subprocess.Popen[bytes] | None = None

    @contextmanager
    def _outliving_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                warnings.warn(f"records of {self.run_dir} are lost: {error}", stacklevel=4)
            self._warned = True

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line of metrics.jsonl: metrics of a step, or of an evaluation after it."""
        with self._outliving_the_disk():
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")

    def samples(self, step: int, ids: list[int]) -> None:
        """Writes one line of samples.jsonl, if enabled: the ids of the global batch."""
        if self._samples is not None:
            with self._outliving_the_disk():
                self._samples.write(json.dumps({"step": step, "samples": ids}) + "\n")

    def bad_samples(self, step: int, bad: Sequence[tuple[str, str]]) -> None:
        """Writes one line of bad_samples.jsonl per replaced image."""
        if bad:
            path = self.run_dir / BAD_SAMPLES
            with self._outliving_the_disk(), path.open("a") as file:
                for name, cause in bad:
                    file.write(json.dumps({"step": step, "name": name, "cause": cause}) + "\n")

    def best_evaluation(self) -> float:
        """Highest k-NN top-1 so far; minus infinity before the first evaluation."""
        lines = read_lines(self.run_dir / METRICS)
        return max((line[EVALUATED] for line in lines if EVALUATED in line), default=-math.inf)

    def draw_curve(self) -> None:
        """Has another process draw `curve.png`; does not wait for it.

        In this one, reading the lines of 100,000 steps would hold Python's lock for two seconds.
        """
        if self._drawing is None or self._drawing.poll() is not None:
            with self._outliving_the_disk():
                self._drawing = subprocess.Popen(
                    [sys.executable, "-P", "-m", "seer_scale.tracking.records", str(self.run_dir)],
                    env=package_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # `close` says what is wrong
                    start_new_session=True,  # Ctrl-C is for the training alone
                )

    def close(self) -> None:
        """Closes the files and draws the curve."""
        if self._drawing is not None:
            self._drawing.kill()
            self._drawing.wait()
        for file in filter(None, (self._metrics, self._samples)):
            with self._outliving_the_disk():
                file.close()
        with self._outliving_the_disk():
            draw_curve(self.run_dir)

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
    """Draws loss, learning rate and signs of collapse over the steps to `curve.png`."""
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
    with replaced_file(path) as fresh:  # the process that draws was ended before
        figure.savefig(fresh, dpi=110, format="png")
    return path


if __name__ == "__main__":
    os.nice(10)  # the training comes first
    draw_curve(Path(sys.argv[1]))
