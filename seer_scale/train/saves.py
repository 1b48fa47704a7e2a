"""The checkpoints of a run: begun between two steps, told to the tracker once they are whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from seer_scale import distributed
from seer_scale.checkpoint import Outcome, Saver, checkpoint_folder
from seer_scale.config import RunConfig
from seer_scale.errors import CheckpointError
from seer_scale.evaluation.during_training import DuringTraining, sheet_of
from seer_scale.parallel.engine import Engine
from seer_scale.tracking import NullTracker, Tracker
from seer_scale.tracking.records import EVALUATED, Records
from seer_scale.train import build
from seer_scale.train.collection import InUse
from seer_scale.train.spikes import WINDOW


@dataclass
class TrainState:
    """How far the run is; all of it is in every checkpoint."""

    step: int = 0
    samples_seen: int = 0
    best_loss: float = math.inf  # smallest mean loss between two checkpoints
    collection: InUse | None = None  # what is read, and since when
    losses: list[float] = field(default_factory=list)  # the last ones, that spikes are held against

    @classmethod
    def of(cls, manifest: Mapping[str, Any], folder: Path) -> Self:
        """The state that a checkpoint's manifest holds."""
        try:
            state = dict(manifest["state"])
            in_use = state.pop("collection")
            found = cls(**state, collection=in_use and InUse(**in_use))
            numbers = [found.step, found.samples_seen]
            if found.collection:
                numbers.append(found.collection.origin)
            if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
                raise ValueError(f"{numbers} should be integers >= 0")
            if type(found.best_loss) is not float or not all(map(math.isfinite, found.losses)):
                raise ValueError("losses should be numbers")
            return found
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{folder}: the manifest's state is damaged ({error})") from None

    def advance(self, images: int) -> None:
        """One more step of `images` images."""
        self.step += 1
        self.samples_seen += images

    def observe(self, loss: float) -> None:
        """Takes in a step's loss, which is finite."""
        self.losses = [*self.losses, loss][-WINDOW:]


class Saves:
    """Begins saves and sees to what follows from them; every rank has one.

    Args:
        config: of the run.
        tracker: is given every checkpoint, and its trunk as a model.
        records: on rank 0; draw the curve anew with every checkpoint.
        say: tells the user something, on rank 0.
        evaluation: judges checkpoints, if `eval.every` asks for it; then `best` follows it.
    """

    def __init__(
        self,
        config: RunConfig,
        tracker: Tracker | NullTracker,
        records: Records | None,
        say: Callable[[str], None],
        evaluation: DuringTraining | None = None,
    ) -> None:
        self._config, self._tracker, self._records, self._say = config, tracker, records, say
        self._evaluation = evaluation
        self._best_score = records.best_evaluation() if records else -math.inf
        self._saver = Saver(
            Path(config.run.dir) / "checkpoints",
            trunk=config.model.trunk,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
        )
        self._losses: list[float] = []  # since the last checkpoint
        self._tags: dict[int, dict[str, Any]] = {}  # of checkpoints under way, by step
        self._problem: str | None = None  # of the last checkpoint
        self._metrics: dict[str, float] = {}

    def observe(self, loss: float) -> None:
        """Takes in the loss of a step: the mean between two checkpoints says which is best."""
        self._losses.append(loss)

    def start(
        self, state: TrainState, engine: Engine, own: Mapping[str, Tensor], *, urgent: bool
    ) -> None:
        """Starts a checkpoint; returns while it is being written, and then needs `before_update`.

        Args:
            state: how far the run is; its best loss is brought up to date.
            engine: whose slices are saved.
            own: what this rank has of its own.
            urgent: the training has nothing else to do.
        """
        began = time.perf_counter()
        # Where no step had a finite loss nothing is known, and such a checkpoint is not the best.
        loss = sum(self._losses) / len(self._losses) if self._losses else math.inf
        best = loss < state.best_loss and self._evaluation is None
        state.best_loss = min(loss, state.best_loss)
        self._losses = []
        if distributed.is_main():  # which alone hears how saves ended
            self._tags[state.step] = {
                **({"loss": f"{loss:.6g}"} if math.isfinite(loss) else {}),
                "samples_seen": state.samples_seen,
                "trunk": self._config.model.trunk,
                "objective": self._config.objective.name,
                "strategy": self._config.sharding.strategy,
                "best": best,
            }
        self._saver.save(
            step=state.step,
            slices=engine.slices(),
            writes_slices=engine.writes_slices,
            model=engine.model,
            local_state=own,
            manifest={
                "state": asdict(state),
                "loss_scale": engine.loss_scale and engine.loss_scale.state(),
                "config": build.public(self._config).model_dump(mode="json"),
            },
            in_place=engine.slices_stay,
            urgent=urgent,
        )
        self._metrics["checkpoint_stall"] = time.perf_counter() - began

    def before_update(self) -> None:
        """Call before the engine updates: a save under way copies what it has not written yet."""
        began = time.perf_counter()
        self._saver.before_update()
        if "checkpoint_stall" in self._metrics:
            self._metrics["checkpoint_stall"] += time.perf_counter() - began

    def evaluation_due(self, step: int) -> bool:
        """Whether the checkpoint of this step is to be judged."""
        every = self._config.eval.every
        return every is not None and (step % every == 0 or step == self._config.train.steps)

    def evaluate(self, step: int) -> None:
        """Judges the checkpoint that was started last, once it is whole; every rank calls it."""
        assert self._evaluation is not None
        self._saver.wait()
        folder = checkpoint_folder(self._saver.root, step)
        if not distributed.broadcast_object(folder.is_dir()):
            return  # `settle` says why
        found = self._evaluation.judge(folder)
        if self._records:
            self._records.metrics(step, found)
            self._tracker.log_metrics(found, step)
            score = found[EVALUATED]
            self._tags[step] |= {EVALUATED.replace("/", "_"): f"{score:.6g}"}
            self._tags[step]["best"] = score > self._best_score
            self._best_score = max(score, self._best_score)
            self._say(f"step {step}: kNN top-1 {score:.4f}")
            if (sheet := sheet_of(folder)).exists():
                self._tracker.log_artifact(sheet, folder=sheet.parent.name)

    def metrics(self) -> dict[str, float]:
        """For the next step's line: how long saves held up the training, and took."""
        found, self._metrics = self._metrics, {}
        return found

    def settle(self) -> None:
        """On rank 0, what follows from saves that have ended."""
        for outcome in self._saver.outcomes():
            tags, self._problem = self._tags.pop(outcome.step), outcome.problem
            if outcome.left_behind:
                self._say(
                    f"warning: an older checkpoint could not be deleted ({outcome.left_behind}); "
                    "it is in the way of nothing but room"
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
        """Waits for the last save on every rank; why it failed, if it did."""
        self._saver.wait()
        self.settle()
        problem: str | None = distributed.broadcast_object(self._problem)
        return problem

    def close(self) -> None:
        """Gives a save that is under way a few seconds; no collective, for failing runs too."""
        self._saver.close()
        self.settle()

    def _hand_over(self, saved: Outcome, tags: dict[str, Any]) -> None:
        best = tags.pop("best")
        if self._records:
            self._records.draw_curve()
        how = self._config.tracking.checkpoints
        self._tracker.log_checkpoint(saved.folder, step=saved.step, how=how)
        if self._config.tracking.log_models:
            self._tracker.log_model(
                saved.folder / "trunk",
                step=saved.step,
                tags=tags,
                aliases=["best"] if best else [],
            )
