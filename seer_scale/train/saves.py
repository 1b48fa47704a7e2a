"""The checkpoints of a run: started between two steps, tracked once they are whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from seer_scale import distributed
from seer_scale.checkpoint import Outcome, Saver, checkpoint_folder
from seer_scale.evaluation.during_training import DuringTraining, sheet_of
from seer_scale.parallel.engine import Engine
from seer_scale.serving import WEIGHTS
from seer_scale.tracking import NullTracker, Tracker
from seer_scale.tracking.records import EVALUATED, Records
from seer_scale.train.state import TrainState

# Seconds for the trunk of the last checkpoint before the machines go: launchers kill what is still
# there after 30 s, and a killed run has no exit status that starts it again.
LEAVING_TRUNK_S = 5.0
# A trunk above this size is registered only where somebody may look at it; see `Saves._registers`.
SMALL_TRUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class SaveSettings:
    """Settings of a run's checkpoints.

    Attributes:
        trunk: name of the trunk, a tag of every model.
        objective: name of the objective, a tag of every model.
        strategy: sharding strategy, a tag of every model.
        config: the configuration without secrets, section by section, for manifests.
        last_step: last step of the run, whose checkpoint is evaluated if any is.
        keep: number of the newest checkpoints that stay.
        keep_every: checkpoints at multiples of these steps stay for good; None for none.
        evaluate_every: steps between two evaluations; None for none.
        artifact: part of a checkpoint that the tracker gets; see `Tracker.log_checkpoint`.
        log_models: whether the tracker gets trunks as models: of every checkpoint, or if they are
            large of those that are evaluated, kept for good or the last.
    """

    trunk: str
    objective: str
    strategy: str
    config: Mapping[str, Any]
    last_step: int
    keep: int
    keep_every: int | None
    evaluate_every: int | None
    artifact: str
    log_models: bool


class Saves:
    """Starts saves, and evaluates and tracks the checkpoints; every rank has one.

    Args:
        folder: folder of the run's checkpoints.
        settings: settings of the checkpoints.
        tracker: receives every checkpoint, and its trunk as a model.
        records: files of rank 0, whose curve is drawn again with every checkpoint; else None.
        say: tells the user something, on rank 0.
        evaluation: judges checkpoints, and thereby which one is best. Without an evaluation the
            best checkpoint is the one with the smallest loss.
    """

    def __init__(
        self,
        folder: Path,
        settings: SaveSettings,
        tracker: Tracker | NullTracker,
        records: Records | None,
        say: Callable[[str], None],
        evaluation: DuringTraining | None = None,
    ) -> None:
        self._settings, self._tracker, self._records, self._say = settings, tracker, records, say
        self._evaluation = evaluation
        self._best_score = records.best_evaluation() if records else -math.inf
        self._saver = Saver(
            folder, trunk=settings.trunk, keep=settings.keep, keep_every=settings.keep_every
        )
        self._losses: list[float] = []  # losses since the last checkpoint
        self._tags: dict[int, dict[str, Any]] = {}  # step -> tags of a checkpoint under way
        self._problem: str | None = None  # why the last checkpoint was not written
        self._metrics: dict[str, float] = {}

    def observe(self, loss: float) -> None:
        """Adds the loss of a step to the mean that decides which checkpoint is best."""
        self._losses.append(loss)

    def start(
        self,
        state: TrainState,
        engine: Engine,
        own: Mapping[str, Tensor],
        *,
        urgent: bool,
        leaving: bool = False,
    ) -> None:
        """Starts a checkpoint and returns while it is written; then call `before_update`.

        Args:
            state: progress of the run, whose best loss is updated.
            engine: engine whose slices are saved.
            own: tensors of this rank alone; see `rank_state`.
            urgent: whether the training has nothing else to do meanwhile.
            leaving: whether the machines are about to be taken away. Then the checkpoint is owed,
                and its trunk only if that takes `LEAVING_TRUNK_S`.
        """
        began = time.perf_counter()
        # A checkpoint before which no step had a finite loss is not the best.
        loss = sum(self._losses) / len(self._losses) if self._losses else math.inf
        best = loss < state.best_loss and self._evaluation is None
        state.best_loss = min(loss, state.best_loss)
        self._losses = []
        if distributed.is_main():  # only rank 0 learns how saves ended
            self._tags[state.step] = {
                **({"loss": f"{loss:.6g}"} if math.isfinite(loss) else {}),
                "samples_seen": state.samples_seen,
                "trunk": self._settings.trunk,
                "objective": self._settings.objective,
                "strategy": self._settings.strategy,
                "best": best,
            }
        self._saver.save(
            step=state.step,
            slices=engine.written_slices(),
            model=engine.model,
            local_state=own,
            manifest={
                "state": asdict(state),
                "loss_scale": engine.loss_scale and engine.loss_scale.state(),
                "config": self._settings.config,
            },
            in_place=engine.slices_stay,
            urgent=urgent,
            trunk_s=LEAVING_TRUNK_S if leaving else math.inf,
        )
        self._metrics["checkpoint_stall"] = time.perf_counter() - began

    def before_update(self) -> None:
        """Copies what a save under way has not written yet; call before the engine updates."""
        began = time.perf_counter()
        self._saver.before_update()
        if "checkpoint_stall" in self._metrics:
            self._metrics["checkpoint_stall"] += time.perf_counter() - began

    def evaluation_due(self, step: int) -> bool:
        """Whether the checkpoint of this step is due for evaluation."""
        every = self._settings.evaluate_every
        return every is not None and (step % every == 0 or step == self._settings.last_step)

    def evaluate(self, step: int) -> None:
        """Evaluates the newest checkpoint once it is whole; every rank calls this method."""
        assert self._evaluation is not None
        self._saver.wait()
        folder = checkpoint_folder(self._saver.root, step)
        if not distributed.broadcast_object((folder / "trunk").is_dir()):
            return  # `settle` tells the user why
        found = self._evaluation.judge(folder)
        if self._records and found:
            self._records.metrics(step, found)
            self._tracker.log_metrics(found, step)
        if self._records and EVALUATED in found:
            score = found[EVALUATED]
            self._tags[step] |= {EVALUATED.replace("/", "_"): f"{score:.6g}"}
            self._tags[step]["best"] = score > self._best_score
            self._best_score = max(score, self._best_score)
            self._say(f"step {step}: kNN top-1 {score:.4f}")
            if (sheet := sheet_of(folder)).exists():
                self._tracker.log_artifact(sheet, folder=sheet.parent.name)

    def metrics(self) -> dict[str, float]:
        """Returns metrics of saves for the next step's line, in seconds."""
        found, self._metrics = self._metrics, {}
        return found

    def settle(self) -> None:
        """Reports and tracks saves that have ended; without effect on ranks other than 0."""
        for outcome in self._saver.outcomes():
            tags, self._problem = self._tags.pop(outcome.step), outcome.problem
            if outcome.left_behind:
                self._say(
                    f"warning: an older checkpoint could not be deleted ({outcome.left_behind}); "
                    "it takes up space, but does no other harm"
                )
            if outcome.without_trunk:
                self._say(
                    f"warning: the checkpoint of step {outcome.step} is whole, but has no trunk/ "
                    f"({outcome.without_trunk}): resume from it as ever; `seer-scale checkpoint "
                    "consolidate` makes weights of it for convert and evaluate"
                )
            if outcome.problem is None:
                self._metrics["checkpoint_seconds"] = outcome.seconds
                self._hand_over(outcome, tags)
            else:
                self._say(
                    f"warning: the checkpoint of step {outcome.step} was not written "
                    f"({outcome.problem}); the training goes on, older checkpoints stay"
                )

    def finish(self) -> str | None:
        """Waits for the last save on every rank; returns why the save failed, or None."""
        self._saver.wait()
        self.settle()
        problem: str | None = distributed.broadcast_object(self._problem)
        return problem

    def close(self) -> None:
        """Gives a save under way a few seconds; uses no collective, so failing runs may call it."""
        self._saver.close()
        self.settle()

    def _hand_over(self, saved: Outcome, tags: dict[str, Any]) -> None:
        best = tags.pop("best")
        if self._records:
            self._records.draw_curve()
        how = self._settings.artifact
        self._tracker.log_checkpoint(saved.folder, step=saved.step, how=how)
        if saved.without_trunk is None and self._registers(saved):
            self._tracker.log_model(
                saved.folder / "trunk",
                step=saved.step,
                tags=tags,
                aliases=["best"] if best else [],
            )

    def _registers(self, saved: Outcome) -> bool:
        """Whether the trunk of a checkpoint becomes a model.

        Models are never deleted: RG-10B's trunk of 36 GiB, saved every 100 steps, would make 45 TB
        in a run.
        """
        if not self._settings.log_models:
            return False
        try:
            if (saved.folder / "trunk" / WEIGHTS).stat().st_size <= SMALL_TRUNK_BYTES:
                return True
        except FileNotFoundError:
            return False  # with checkpoint.keep=1 the save after it has pruned it already
        every, step = self._settings.keep_every, saved.step
        kept = every is not None and step % every == 0
        return kept or self.evaluation_due(step) or step == self._settings.last_step
