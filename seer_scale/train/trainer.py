"""The training step and the loop around it; neither knows the sharding strategy.

`build.trainer_of` builds a trainer from a run's configuration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from seer_scale import distributed
from seer_scale.checkpoint import list_checkpoints
from seer_scale.data import BadSample
from seer_scale.distributed.watchdog import Watchdog
from seer_scale.errors import CheckpointError, UserError
from seer_scale.objectives import Objective
from seer_scale.optim.schedules import prototypes_frozen
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.parallel.build_optimizer import PROTOTYPES
from seer_scale.parallel.engine import Engine
from seer_scale.performance.garbage import GarbageCollection
from seer_scale.train.bad_samples import BadSamples
from seer_scale.train.image_stream import ImageStream
from seer_scale.train.nonfinite import Computed, culprits, dump
from seer_scale.train.phases import LAST, UPDATING, Phases
from seer_scale.train.rank_state import rank_state
from seer_scale.train.saves import Saves
from seer_scale.train.settings import TrainSettings
from seer_scale.train.spikes import Spike
from seer_scale.train.state import TrainState
from seer_scale.train.step_guard import StepGuard, Verdict
from seer_scale.train.step_totals import StepTotals, Totals
from seer_scale.train.stopping import Stop, StopSignals
from seer_scale.train.telemetry import Telemetry


class StepResult(NamedTuple):
    """Result of a step.

    Attributes:
        metrics: the step's values in metrics.jsonl.
        stop: whether the run stops after the step, and why; the same on every rank.
        refresh: whether to read the manifest of shards now; the same on every rank.
    """

    metrics: dict[str, float]
    stop: Stop
    refresh: bool


@dataclass
class Trainer:
    """One rank's part of a run.

    Attributes:
        settings: numbers and choices of the loop.
        run_dir: folder of the run.
        device: device of this rank.
        state: progress of the run.
        objective: objective of the run.
        engine: sharded model with its optimizer.
        images: stream of this rank's micro-batches.
        guard: guard over steps that must not count.
        bad_samples: count of images that could not be used.
        watchdog: watchdog of this rank.
        phase: marks the phases of a step.
        saves: checkpoints of the run.
        telemetry: reports of the run.
        garbage: garbage collection between steps.
        stop_signals: signals that ask the run to stop.
        spike: loss that ended this trainer by a rewind, or None.
    """

    settings: TrainSettings
    run_dir: Path
    device: torch.device
    state: TrainState
    objective: Objective
    engine: Engine
    images: ImageStream
    guard: StepGuard
    bad_samples: BadSamples
    watchdog: Watchdog
    phase: Phases
    saves: Saves
    telemetry: Telemetry
    garbage: GarbageCollection
    stop_signals: StopSignals
    spike: Spike | None = field(default=None, init=False)

    # --------------------------------------------------------------------------- one step

    def train_step(self) -> StepResult:
        """Runs one step; the host waits for the device once, when it reads the totals."""
        began, worked = time.perf_counter(), self.phase.begin(self.state.step + 1)
        self._apply_schedules()
        self.guard.begin(self.state.losses)
        sums, step = StepTotals(self.device, self.settings.accumulation), list[Computed]()
        for micro in range(1, self.settings.accumulation + 1):
            last = micro == self.settings.accumulation
            with self.phase("data"):
                batch = next(self.images)
            with self.phase("forward"):
                queue = getattr(self.objective, "queue", None)
                embeddings, scores = self.engine(batch.crops, queue)
            with self.phase("loss"):
                loss, metrics = self.objective(embeddings, scores)
            sums.add({**metrics, "loss": loss})
            step.append(Computed(batch, loss.detach(), scores.detach()))
            with self.phase("backward"):
                self.engine.backward(self.guard.gate(loss, sums["loss"] if last else None))
            if last:
                self.watchdog.at(self.state.step + 1, LAST, UPDATING)
                self.saves.before_update()
            with self.phase("optimizer"):
                grad_norm = self.engine.step()
        assert grad_norm is not None
        self.state.advance(self.settings.global_batch)
        totals = sums.over_ranks(
            grad_norm,
            bad=sum(len(done.batch.bad) for done in step),
            worked=worked,
            stop=self.stop_signals.wish,
            refresh=self.images.refresh_due(),
        )
        self.watchdog.at(self.state.step + 1, -4, "reporting")  # files are written from here on
        verdict, stop = self._judge(totals, step)
        self._record_samples(step, totals.bad)
        line = self._line(totals, verdict, time.perf_counter() - began)
        return StepResult(line, stop, totals.refresh)

    def _apply_schedules(self) -> None:
        step = self.state.step
        still = prototypes_frozen(step, self.settings.frozen_steps)
        apply_schedule(
            self.engine.param_groups,
            lr=self.settings.learning_rate(step),
            frozen=PROTOTYPES if still else frozenset(),
        )

    def _line(self, totals: Totals, verdict: Verdict, seconds: float) -> dict[str, float]:
        return self.telemetry.metrics(
            totals,
            verdict,
            self.engine,
            seconds=seconds,
            waited=self.phase.seconds["data"],
            samples_seen=self.state.samples_seen,
        )

    def _judge(self, totals: Totals, step: Sequence[Computed]) -> tuple[Verdict, Stop]:
        """Answers a step with a fault; every rank has the same totals and answers alike."""
        loss, norm, stop = totals.means["loss"], totals.grad_norm, totals.stop
        scale = self.engine.loss_scale
        overflow = scale is not None and scale.overflowed  # float16 has skipped the step
        verdict = self.guard.judge(loss, norm, overflow=overflow)
        if verdict is Verdict.NONFINITE:
            self._answer_nonfinite(loss, norm, step)
        elif verdict is not Verdict.GOOD and self._answer_spike(loss, verdict, stop):
            stop = Stop.REWIND
        return verdict, stop

    def _answer_nonfinite(self, loss: float, grad_norm: float, step: Sequence[Computed]) -> None:
        """Warns that a step was not finite.

        Raises:
            UserError: after too many such steps in a row.
        """
        number, row = self.state.step, self.guard.nonfinite
        what = (
            f"the loss of step {number} is {loss}, the norm of its gradient {grad_norm}, on "
            f"{culprits(step)}"
        )
        if row < self.settings.max_nonfinite:
            self.telemetry.say(f"warning: {what}: its update is skipped, {row} in a row")
            return
        folder = self.run_dir / f"nonfinite_step_{number}"
        problem = dump(folder, step)
        self.saves.finish()
        saved = list_checkpoints(self.run_dir / "checkpoints")
        raise UserError(
            f"{what}: {row} in a row (train.max_nonfinite), and the run stops; the last good "
            f"checkpoint is {saved[-1] if saved else 'none'}; what the ranks computed is "
            f"{f'not written ({problem})' if problem else f'in {folder}'}; try a lower optim.lr or "
            "optim.base_lr, a longer optim.warmup_steps or train.precision=fp32"
        )

    def _answer_spike(self, loss: float, verdict: Verdict, stop: Stop) -> bool:
        """Returns whether the run rewinds because its loss jumped; if not, warns."""
        step, threshold = self.state.step, self.guard.threshold
        if self.settings.rewind_on_spike and stop is Stop.NO:
            self.spike = Spike(step, loss, threshold, self.state.samples_seen)
            return True
        then = "its update is skipped" if verdict is Verdict.SKIPPED_SPIKE else "the run goes on"
        self.telemetry.say(
            f"warning: the loss of step {step} is {loss:.6g}, a spike above {threshold:.6g}: {then}"
        )
        return False

    def _record_samples(self, step: Sequence[Computed], bad: int) -> None:
        if self.settings.log_samples:
            ids = torch.stack([done.batch.sample_ids for done in step])  # [accumulation, B]
            self.telemetry.samples(self.state.step, ids)
        if bad:
            mine = [sample for done in step for sample in done.batch.bad]
            everyone: list[BadSample] = distributed.gather_lists(mine)
            self.bad_samples.count(everyone)
            self.telemetry.bad_samples(self.state.step, everyone)
        self.bad_samples.observe(self.settings.global_batch, bad)

    # --------------------------------------------------------------------------- the loop

    def train(self) -> Stop:
        """Runs to the last step, or to a signal, and saves checkpoints on the way.

        Returns:
            What stopped the run.

        Raises:
            CheckpointError: at the end, if the last checkpoint could not be written.
            UserError: after too many consecutive non-finite steps.
            DataError: if too many images cannot be used.
        """
        saved_step = self.state.step
        stop = Stop.NO
        self.watchdog.at(self.state.step, 0, "beginning")
        while self.state.step < self.settings.steps and stop is Stop.NO:
            with self.telemetry.profiler.step(self.state.step + 1):
                metrics, stop, refresh = self.train_step()
            self.garbage.after(self.state.step)
            self.log({**metrics, **self.saves.metrics()})
            self.saves.settle()
            if stop is Stop.REWIND:
                self.saves.finish()  # the run may rewind to a checkpoint that is still written
                return stop
            if refresh:
                self.watchdog.at(self.state.step + 1, -3, "reading the manifest of shards")
                self.images.refresh()
            last = stop is not Stop.NO or self.state.step == self.settings.steps
            due = self.saves.evaluation_due(self.state.step)
            if last or due or self.state.step % self.settings.checkpoint_every == 0:
                self.watchdog.at(self.state.step + 1, -2, "saving")
                own = rank_state(self.objective, self.device)
                leaving = stop is Stop.REQUEUE
                self.saves.start(self.state, self.engine, own, urgent=last or due, leaving=leaving)
                saved_step = self.state.step
            if due:
                self.watchdog.at(self.state.step + 1, -1, "evaluating")
                self.saves.evaluate(self.state.step)
        self.telemetry.profiler.close()
        if problem := self.saves.finish():
            raise CheckpointError(
                f"the last checkpoint, of step {saved_step}, was not written ({problem}): solve "
                "that problem and resume from the checkpoint before with --resume auto"
            )
        if stop is not Stop.NO:
            self.telemetry.say(
                f"stopped by a signal after step {saved_step}, which is saved; continue with "
                "--resume auto"
            )
        return stop

    def log(self, metrics: dict[str, float]) -> None:
        """Takes the metrics of the step just done into account, and reports them."""
        if math.isfinite(metrics["loss"]):
            self.saves.observe(metrics["loss"])
            self.state.observe(metrics["loss"])
        self.telemetry.log(self.state.step, metrics)

    def close(self, status: str) -> None:
        """Ends workers, files and tracking.

        Args:
            status: FINISHED, KILLED or FAILED.
        """
        self.watchdog.close()
        self.garbage.close()
        self.images.close()
        self.saves.close()
        self.telemetry.close(status, self.bad_samples.report())
        self.stop_signals.close()
