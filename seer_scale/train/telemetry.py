"""Reports of a run: to the terminal, to the files of the run folder, and to the tracker.

Nothing here decides how the training goes on.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from seer_scale import distributed
from seer_scale.data import BadSample
from seer_scale.objectives import CollapseWatch
from seer_scale.parallel.engine import Engine
from seer_scale.performance.profiler import Profiler
from seer_scale.performance.stragglers import Stragglers
from seer_scale.performance.utilisation import Utilisation
from seer_scale.tracking import NullTracker, Tracker
from seer_scale.tracking.progress import Progress
from seer_scale.tracking.records import Records
from seer_scale.train.rewinds import RECORD
from seer_scale.train.step_guard import Verdict
from seer_scale.train.step_totals import Totals

SKIPPED = "update_skipped"  # metric of steps with a fault: 1 if the update was skipped, else 0
TRACKER_SECONDS = 60.0  # longest wait for the tracker at the end of a finished run
# Files of the run folder that are uploaded as artifacts at the end.
ARTIFACTS = ("curve.png", "metrics.jsonl", "bad_samples.jsonl", "refreshes.jsonl", RECORD)


class Telemetry:
    """Reports what one rank's trainer does; every rank has one, rank 0 writes.

    Args:
        run_dir: folder of the run.
        device: device of this rank.
        global_batch: images per step, over all ranks.
        settled_step: step from which the loss may be judged for collapse, after warm-up.
        progress: display of rank 0; None on other ranks.
        records: files of rank 0; None on other ranks.
        tracker: tracker of rank 0; a tracker without effect on other ranks.
        utilisation: operations against the device's peak; None if the peak is unknown.
        profiler: profiler of this rank.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        device: torch.device,
        global_batch: int,
        settled_step: int,
        progress: Progress | None,
        records: Records | None,
        tracker: Tracker | NullTracker,
        utilisation: Utilisation | None,
        profiler: Profiler,
    ) -> None:
        self._run_dir, self._device, self._global_batch = run_dir, device, global_batch
        self._progress, self._records, self._tracker = progress, records, tracker
        self._utilisation = utilisation
        self._collapse = CollapseWatch(settled_step)
        self.stragglers = Stragglers(self.say)
        self.profiler = profiler

    def say(self, text: str) -> None:
        """Tells the user something, on rank 0."""
        if self._progress:
            self._progress.say(text)

    def metrics(
        self,
        totals: Totals,
        verdict: Verdict,
        engine: Engine,
        *,
        seconds: float,
        waited: float,
        samples_seen: int,
    ) -> dict[str, float]:
        """Builds a step's line of metrics.jsonl.

        Args:
            totals: what all ranks' micro-batches add up to.
            verdict: whether the step was good.
            engine: engine that made the step, for its learning rate and loss scale.
            seconds: wall-clock time of the step.
            waited: seconds of it that this rank waited for images.
            samples_seen: position in the stream of images after the step.
        """
        line = {**totals.means}
        if verdict is not Verdict.GOOD:
            line[SKIPPED] = float(verdict is not Verdict.SPIKE)
        line |= {"lr": engine.param_groups[0]["lr"], "grad_norm": totals.grad_norm}
        if scale := engine.loss_scale:
            line |= {
                "loss_scale": scale.stepped_with,
                "loss_scale_overflow": float(scale.overflowed),
            }
        line |= self.stragglers.observe(totals.work)
        if self._utilisation:
            per_rank = self._global_batch / seconds / distributed.world_size()
            line |= self._utilisation.metrics(per_rank)
        return line | {
            "images_per_second": self._global_batch / seconds,
            "step_time": seconds,
            "data_time": waited,
            "peak_memory_gib": peak_memory_gib(self._device),
            "samples_seen": samples_seen,
            "bad_samples": totals.bad,
        }

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Shows and records a step's metrics, and warns if the run looks collapsed."""
        if not (self._records and self._progress):
            return
        self._progress.update(step, metrics)
        # JSON has no infinity: a skipped step has no value for its loss or its gradient's norm.
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self._records.metrics(step, metrics)
        self._tracker.log_metrics(metrics, step)
        if warning := self._collapse.observe(step, metrics):
            self.say(f"warning: {warning}")

    def samples(self, step: int, ids: Tensor) -> None:
        """Records the samples of a step in the order of the stream; every rank calls this method.

        Args:
            step: number of the step, counted from 1.
            ids: sample ids of this rank, [accumulation, micro-batch].
        """
        ranks = distributed.all_gather(ids.to(self._device)[None])  # [world, accumulation, B]
        if self._records:  # micro-batch before rank: the same order at every world size
            self._records.samples(step, ranks.transpose(0, 1).flatten().tolist())

    def bad_samples(self, step: int, everyone: Sequence[BadSample]) -> None:
        """Records the images of a step, of all ranks, that were replaced."""
        if self._records:
            self._records.bad_samples(step, everyone)

    def close(self, status: str, bad_samples: str) -> None:
        """Closes the display, the files and the tracker.

        Args:
            status: FINISHED, KILLED or FAILED.
            bad_samples: causes of unusable images with their numbers; empty if there were none.
        """
        if self._progress:
            self._progress.close()
        if self._records:
            self._records.close()
            if bad_samples:
                self.say(f"images that could not be used and were replaced: {bad_samples}")
            for name in ARTIFACTS:
                if (self._run_dir / name).exists():
                    self._tracker.log_artifact(self._run_dir / name)
        # A user who stops a run does not wait for its tracker.
        wait = TRACKER_SECONDS if status == "FINISHED" else 0.0
        if not self._tracker.close(status, wait_s=wait):
            problem = self._tracker.problem()
            self.say(
                f"not everything has reached MLflow yet{f' ({problem})' if problem else ''}; the "
                f"sender continues for a while, and `seer-scale sync {self._run_dir}` sends the "
                "rest at any time"
            )
        if refused := self._tracker.refused():
            self.say(f"warning: {refused}")


def peak_memory_gib(device: torch.device) -> float:
    """Returns the most GiB this rank has held so far: of its GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
