"""The training loop: it knows verbs, never the sharding strategy.

What a run needs is built in `Trainer.__init__` in one visible order; a step is `train_step`.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer_scale import distributed
from seer_scale.checkpoint import CheckpointReader, list_checkpoints
from seer_scale.config import RunConfig, recipe
from seer_scale.data import BadSample, DeviceBatches, MicroBatch, Source
from seer_scale.distributed.watchdog import Watchdog
from seer_scale.distributed.work_clock import CLOCK
from seer_scale.errors import CheckpointError, UserError
from seer_scale.models import seeded_values
from seer_scale.objectives import CollapseWatch, build_objective
from seer_scale.optim.schedules import prototypes_frozen
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.parallel.compatibility import max_nonfinite
from seer_scale.parallel.compile import check_compiler
from seer_scale.parallel.engine import PROTOTYPES, recompute_plan, shard
from seer_scale.performance.garbage import GarbageCollection
from seer_scale.performance.stragglers import Stragglers
from seer_scale.tracking.progress import Progress
from seer_scale.tracking.records import Records
from seer_scale.train import build
from seer_scale.train.announce import announce
from seer_scale.train.bad_samples import BadSamples
from seer_scale.train.nonfinite import culprits, dump
from seer_scale.train.rank_state import load_rank_state, rank_state, seed_rank
from seer_scale.train.rewinds import RECORD, position_after, read_rewinds
from seer_scale.train.saves import Saves, TrainState
from seer_scale.train.spikes import Spike
from seer_scale.train.step_guard import StepGuard, Verdict
from seer_scale.train.step_totals import StepTotals, Totals
from seer_scale.train.stopping import Stop, StopSignals

SKIPPED = "update_skipped"  # in a step that was no ordinary one: 1 if its update was left out
TRACKER_SECONDS = 60.0  # at the end, for what is still under way to it
# Of a run's folder, logged as artifacts when it ends.
RECORDS = ("curve.png", "metrics.jsonl", "bad_samples.jsonl", "refreshes.jsonl", RECORD)


class Trainer:
    """One rank's part of a run.

    Args:
        config: the resolved configuration.
        ds_config: resolved DeepSpeed configuration, for strategy `zero`.
        source: the opened training data.
        resume: the checkpoint to go on from, or None.
        device: of this rank.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        ds_config: dict[str, Any] | None,
        source: Source,
        resume: CheckpointReader | None,
        device: torch.device,
    ) -> None:
        self.config, self.device = config, device
        self.run_dir = Path(config.run.dir)
        self.global_batch = build.global_batch(config)
        self.stop_signals = StopSignals()
        if config.train.compile:
            check_compiler(device)
        seed_rank(config.run.seed, distributed.rank())
        self.objective = build_objective(
            config.objective.name,
            crops=sum(config.data.crop_counts),
            options=config.objective.options,
        )
        reader = resume
        if reader:
            reader.check(build.model_of(config, torch.device("meta")))
        self.state = TrainState.of(reader.manifest, reader.folder) if reader else TrainState()
        self.plan = recompute_plan(partial(build.model_of, config), config)
        evaluation = build.evaluation_of(config, device)
        # Not before all that a user may have got wrong: a finished run's record stays as it is.
        self.tracker = build.tracker_of(config, self.state.step)
        self.engine = shard(
            partial(build.model_of, config),
            reader.values if reader else partial(seeded_values, seed=config.run.seed),
            config,
            ds_config,
            device,
            self.plan,
        )
        if reader:
            reader.fill_momentum(self.engine.slices())
            saved_scale = reader.manifest.get("loss_scale")
            if self.engine.loss_scale and saved_scale:  # neither, if the precision was another
                self.engine.loss_scale.load(saved_scale)
            self._load_rank_state(reader)
        self.progress = (
            Progress(config.train.steps, self.state.step) if distributed.is_main() else None
        )
        self.collection = build.collection_of(
            config,
            source,
            saved=self.state.collection,
            saved_run=reader.folder.parents[1] if reader else self.run_dir,
            cursor=self.state.samples_seen,
            say=self._say,
        )
        # After the collection, which takes the turns up to there by itself.
        rewinds = read_rewinds(self.run_dir)
        self.state.samples_seen = position_after(rewinds, self.state.step, self.state.samples_seen)
        if rewinds:
            self.tracker.set_tags({"rewinds": len(rewinds)})
        self._open_batches()
        self.guard = StepGuard(
            self.engine.model,
            self.objective,
            mads=config.train.spike_mads,
            skip_spikes=config.train.on_spike == "skip",
            micro_batches=config.train.gradient_accumulation,
        )
        self._max_nonfinite = max_nonfinite(config, ds_config)
        self.spike: Spike | None = None  # that ended the training, with on_spike=rewind
        self.bad_samples = BadSamples(config.data.max_bad_fraction)
        self.watchdog = Watchdog(60 * config.run.hang_minutes)
        self.records = self._open_records()
        self.saves = Saves(config, self.tracker, self.records, self._say, evaluation)
        optim = config.optim
        self.collapse = CollapseWatch(max(optim.warmup_steps, optim.freeze_prototypes_steps))
        self.utilisation = build.utilisation_of(config, device, self.plan, self._say)
        self.stragglers = Stragglers(self._say)
        CLOCK.take()  # what an earlier run of this process has left
        self.profiler = build.profiler_of(config, device, self.tracker, self._say)
        announce(
            config,
            self.tracker,
            self._say,
            step=self.state.step,
            plan=self.plan,
            device=device,
            saved_config=reader.manifest.get("config", {}) if reader else None,
        )
        self.garbage = GarbageCollection(config.run.gc_every)

    # --------------------------------------------------------------------------- one step

    def train_step(self) -> tuple[dict[str, float], Stop, bool]:
        """One optimizer step: its metrics, who was asked to stop, is the manifest to be read."""
        began = time.perf_counter()
        worked = CLOCK.take()  # in the step before
        self._apply_schedules()
        sums = StepTotals(self.device, self.config.train.gradient_accumulation)
        micro_batches: list[MicroBatch] = []
        losses: list[Tensor] = []
        scored: list[Tensor] = []
        waited = 0.0
        self.guard.begin(self.state.losses)
        for micro in range(self.config.train.gradient_accumulation):
            asked = time.perf_counter()
            self.watchdog.at(self.state.step + 1, 2 * micro, "waiting for images")
            with CLOCK.lap(self.device):
                with self.profiler.range("data"):
                    batch = next(self.device_batches)
                self.watchdog.at(self.state.step + 1, 2 * micro + 1, "computing")
                waited += time.perf_counter() - asked
                micro_batches.append(batch)
                with self.profiler.range("forward"):
                    queue = getattr(self.objective, "queue", None)
                    embeddings, scores = self.engine(batch.crops, queue)
                with self.profiler.range("loss"):
                    loss, metrics = self.objective(embeddings, scores)
            sums.add({**metrics, "loss": loss})
            losses.append(loss.detach())
            scored.append(scores.detach())
            last = micro + 1 == self.config.train.gradient_accumulation
            with self.profiler.range("backward"):
                self.engine.backward(self.guard.gate(loss, sums["loss"] if last else None))
            if last:
                self.saves.before_update()
            with self.profiler.range("optimizer"):
                grad_norm = self.engine.step()
        assert grad_norm is not None
        self.state.advance(self.global_batch)

        # The step's one wait for the device; the loss scale of float16 has another.
        totals = sums.over_ranks(
            grad_norm,
            bad=sum(len(batch.bad) for batch in micro_batches),
            worked=worked,
            stop=self.stop_signals.wish,
            refresh=self.collection.due(self.state.step, self.state.samples_seen),
        )
        # All of it is the same on every rank, so all do the same.
        mean, norm, stop = totals.means["loss"], totals.grad_norm, totals.stop
        verdict = self.guard.judge(mean, norm, overflow=self._overflowed)
        if verdict is Verdict.NONFINITE:
            self._leave_out(mean, norm, micro_batches, losses, scored)
        elif verdict is not Verdict.GOOD and self._answer_spike(mean, verdict, stop):
            stop = Stop.REWIND
        self._record_samples(micro_batches, totals.bad)
        seconds = time.perf_counter() - began
        return self._metrics(totals, verdict, seconds, waited), stop, totals.refresh

    @property
    def _overflowed(self) -> bool:
        """Whether the loss scale of float16 has skipped the step."""
        return self.engine.loss_scale is not None and self.engine.loss_scale.overflowed

    def _metrics(
        self, totals: Totals, verdict: Verdict, seconds: float, waited: float
    ) -> dict[str, float]:
        """A step's line in metrics.jsonl."""
        line = {**totals.means}
        if verdict is not Verdict.GOOD:
            line[SKIPPED] = float(verdict is not Verdict.SPIKE)
        line |= {"lr": self.engine.param_groups[0]["lr"], "grad_norm": totals.grad_norm}
        if scale := self.engine.loss_scale:
            line |= {
                "loss_scale": scale.stepped_with,
                "loss_scale_overflow": float(scale.overflowed),
            }
        line |= self.stragglers.observe(totals.work)
        if self.utilisation:
            of_a_rank = self.global_batch / seconds / distributed.world_size()
            line |= self.utilisation.metrics(of_a_rank)
        return line | {
            "images_per_second": self.global_batch / seconds,
            "step_time": seconds,
            "data_time": waited,
            "peak_memory_gib": peak_memory_gib(self.device),
            "samples_seen": self.state.samples_seen,
            "bad_samples": totals.bad,
        }

    def _leave_out(
        self,
        loss: float,
        grad_norm: float,
        micro_batches: list[MicroBatch],
        losses: list[Tensor],
        scores: list[Tensor],
    ) -> None:
        """Says whose loss was not finite; ends the run where that is too many in a row."""
        step, row = self.state.step, self.guard.nonfinite
        what = (
            f"the loss of step {step} is {loss}, the norm of its gradient {grad_norm}, on "
            f"{culprits(micro_batches, losses)}"
        )
        if row < self._max_nonfinite:
            self._say(f"warning: {what}: its update is left out, {row} in a row")
            return
        folder = self.run_dir / f"nonfinite_step_{step}"
        problem = dump(folder, micro_batches, losses, scores)
        self.saves.finish()
        saved = list_checkpoints(self.run_dir / "checkpoints")
        raise UserError(
            f"{what}: {row} in a row (train.max_nonfinite), and the run stops; the last good "
            f"checkpoint is {saved[-1] if saved else 'none'}; what the ranks computed is "
            f"{f'not written ({problem})' if problem else f'in {folder}'}; try a lower optim.lr or "
            "optim.base_lr, a longer optim.warmup_steps or train.precision=fp32"
        )

    def _answer_spike(self, loss: float, verdict: Verdict, stop: Stop) -> bool:
        """Says that a loss has jumped; whether the run goes back to its last checkpoint."""
        step, threshold = self.state.step, self.guard.threshold
        if self.config.train.on_spike == "rewind" and stop is Stop.NO:
            self.spike = Spike(step, loss, threshold, self.state.samples_seen)
            return True
        then = "its update is left out" if verdict is Verdict.SKIPPED_SPIKE else "the run goes on"
        self._say(
            f"warning: the loss of step {step} is {loss:.6g}, a spike above {threshold:.6g}: {then}"
        )
        return False

    def _apply_schedules(self) -> None:
        step = self.state.step
        still = prototypes_frozen(step, self.config.optim.freeze_prototypes_steps)
        apply_schedule(
            self.engine.param_groups,
            lr=build.learning_rate_of(self.config, step),
            frozen=PROTOTYPES if still else frozenset(),
        )

    def _record_samples(self, micro_batches: list[MicroBatch], bad: int) -> None:
        if self.config.run.log_samples:
            ids = torch.stack([batch.sample_ids for batch in micro_batches])  # [accumulation, B]
            ranks = distributed.all_gather(ids.to(self.device)[None])  # [world, accumulation, B]
            if self.records:  # in the order of the stream, which no world size changes
                self.records.samples(self.state.step, ranks.transpose(0, 1).flatten().tolist())
        if bad:
            mine = [sample for batch in micro_batches for sample in batch.bad]
            everyone: list[BadSample] = distributed.gather_lists(mine)
            self.bad_samples.count([sample.cause for sample in everyone])
            if self.records:
                self.records.bad_samples(self.state.step, everyone)
        self.bad_samples.observe(self.global_batch, bad)

    # --------------------------------------------------------------------------- the loop

    def train(self) -> Stop:
        """Runs to the last step, or to a signal; saves as it goes. Returns what stopped it.

        Raises:
            CheckpointError: at the end, if the last checkpoint could not be written.
        """
        saved_step = self.state.step
        stop = Stop.NO
        self.watchdog.at(self.state.step, 0, "beginning")
        while self.state.step < self.config.train.steps and stop is Stop.NO:
            with self.profiler.step(self.state.step + 1):
                metrics, stop, refresh = self.train_step()
            self.garbage.after(self.state.step)
            self._log({**metrics, **self.saves.metrics()})
            self.saves.settle()
            if stop is Stop.REWIND:
                self.saves.finish()  # what is being written may be what to go back to
                return stop
            if refresh:
                self._read_manifest()
            last = stop is not Stop.NO or self.state.step == self.config.train.steps
            due = self.saves.evaluation_due(self.state.step)
            if last or due or self.state.step % self.config.checkpoint.every == 0:
                self.watchdog.at(self.state.step + 1, -2, "saving")
                self.saves.start(
                    self.state,
                    self.engine,
                    rank_state(self.objective, self.device),
                    urgent=last or due,
                )
                saved_step = self.state.step
            if due:
                self.watchdog.at(self.state.step + 1, -1, "evaluating")
                self.saves.evaluate(self.state.step)
        self.profiler.close()
        if problem := self.saves.finish():
            raise CheckpointError(
                f"the last checkpoint, of step {saved_step}, was not written ({problem}): mend "
                "that and go on with --resume auto, from the one before it"
            )
        if stop is not Stop.NO:
            self._say(
                f"stopped by a signal after step {saved_step}, which is saved; go on with "
                "--resume auto"
            )
        return stop

    def close(self, status: str) -> None:
        """Ends workers, files and tracking; `status` is FINISHED, KILLED or FAILED."""
        self.watchdog.close()
        self.garbage.close()
        self.batches.close()
        self.saves.close()
        if self.progress:
            self.progress.close()
        if self.records:
            self.records.close()
            if causes := self.bad_samples.report():
                self._say(f"images that could not be used and were replaced: {causes}")
            for name in RECORDS:
                if (self.run_dir / name).exists():
                    self.tracker.log_artifact(self.run_dir / name)
        # Nobody who stopped a run wants to wait for its records.
        sent = self.tracker.close(status, wait_s=TRACKER_SECONDS if status == "FINISHED" else 0.0)
        self.stop_signals.close()
        if not sent and self.config.tracking.enabled:
            self._say(
                "not everything has reached MLflow yet; the sender goes on for a while, and "
                f"`seer-scale sync {self.run_dir}` sends what is left at any time"
            )

    def _log(self, metrics: dict[str, float]) -> None:
        if math.isfinite(metrics["loss"]):
            self.saves.observe(metrics["loss"])
            self.state.observe(metrics["loss"])
        if not (self.records and self.progress):
            return
        step = self.state.step
        self.progress.update(step, metrics)
        # JSON has no infinity; what is missing was of a step that was left out.
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self.records.metrics(step, metrics)
        self.tracker.log_metrics(metrics, step)
        if warning := self.collapse.observe(step, metrics):
            self._say(f"warning: {warning}")

    def _say(self, text: str) -> None:
        if self.progress:
            self.progress.say(text)

    # --------------------------------------------------------------------------- the images

    def _open_batches(self) -> None:
        """Images of the collection in use, from where the run is."""
        self.state.collection = self.collection.in_use
        self.batches = build.batches_of(self.config, self.collection, self.state.samples_seen)
        memory_format = build.memory_format_of(self.config.train.memory_format, self.device)
        self.device_batches = DeviceBatches(self.batches, self.device, memory_format)

    def _read_manifest(self) -> None:
        """Between two steps of all ranks; what was made ahead of another collection is dropped."""
        self.watchdog.at(self.state.step + 1, -3, "reading the manifest of shards")
        if self.collection.refresh(self.state.samples_seen):
            self.batches.close()
            self._open_batches()

    # --------------------------------------------------------------------------- building

    def _load_rank_state(self, reader: CheckpointReader) -> None:
        whole = load_rank_state(
            reader.local_states(),
            self.objective,
            self.device,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        if not whole and distributed.is_main():
            print(
                f"objective.name={self.config.objective.name} cannot take over its state from "
                f"{reader.manifest['world_size']} ranks to {distributed.world_size()}: it starts "
                "afresh",
                file=sys.stderr,
            )

    def _open_records(self) -> Records | None:
        if not distributed.is_main():
            return None
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # Before the records, which make a folder a run's: a full disk must not leave one.
        (self.run_dir / "config.yaml").write_text(recipe.dump(build.public(self.config)))
        return Records(
            self.run_dir,
            first_step=self.state.step,
            log_samples=self.config.run.log_samples,
        )


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
