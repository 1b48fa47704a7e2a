"""Saves while training continues: a thread of every rank writes the rank's tensors.

A save delays training only by the copying that cannot be put off (see `staging`). Every rank
writes its file (see `rank_files`); rank 0 waits for all files, adds the manifest, and renames the
folder. So a checkpoint exists whole or not at all, and the death of a rank after its file is
written does no harm. Then rank 0 adds the trunk (see `trunk_export`), which resuming does not need.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.checkpoint.folders import delete, make_room, publish, set_aside
from seer_scale.checkpoint.manifest import (
    checkpoint_folder,
    list_checkpoints,
    one_line,
    write_manifest,
)
from seer_scale.checkpoint.rank_files import write_rank_file, written_files
from seer_scale.checkpoint.retention import expired
from seer_scale.checkpoint.staging import Staging, stage
from seer_scale.checkpoint.trunk_export import add_trunk
from seer_scale.errors import CheckpointError
from seer_scale.optim.slices import Slice
from seer_scale.parallel.convert_batchnorm import average_running_statistics
from seer_scale.serving import versions

PATIENCE_S = 1800.0  # that rank 0 waits for the reports of other ranks


@dataclass(frozen=True)
class Outcome:
    """Result of a save; `problem` is None if the checkpoint is whole.

    Attributes:
        step: step of the checkpoint.
        folder: folder of the checkpoint.
        problem: reason why the checkpoint is not whole.
        seconds: from the call of `save` to the end of the writing.
        left_behind: reason why an older checkpoint could not be deleted.
        without_trunk: reason why the checkpoint, whole otherwise, has no `trunk/`.
    """

    step: int
    folder: Path
    problem: str | None
    seconds: float
    left_behind: str | None = None
    without_trunk: str | None = None


class Saver:
    """Writes the checkpoints of one run; every rank has a `Saver` and makes the same calls.

    Args:
        root: folder of the run's checkpoints, on a file system that all ranks see.
        trunk: name of the trunk, exported beside the slices into `trunk/`.
        keep: how many checkpoints stay.
        keep_every: checkpoints of these steps' multiples stay for good.
    """

    def __init__(self, root: Path, *, trunk: str, keep: int, keep_every: int | None = None) -> None:
        self.root, self.trunk = root, trunk
        self.keep, self.keep_every = keep, keep_every
        if distributed.is_main():
            # Of saves and deletions that were killed: rank 0 owns the run's folder.
            for stale in root.glob(".step_*"):
                shutil.rmtree(stale, ignore_errors=True)
        # Of this attempt: what a rank of an earlier one may still be writing is not mixed in.
        self._attempt: str = distributed.broadcast_object(secrets.token_hex(4))
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._patience = PATIENCE_S
        self._trunk_s = math.inf
        self._outcomes: deque[Outcome] = deque()  # rank 0's; its thread appends

    def save(
        self,
        *,
        step: int,
        slices: Iterable[Slice],
        model: nn.Module,
        local_state: Mapping[str, Tensor],
        manifest: Mapping[str, Any],
        in_place: bool = False,
        urgent: bool = False,
        trunk_s: float = math.inf,
    ) -> None:
        """Takes the state and starts to write it, after the previous save has ended.

        A failed save is an `Outcome`, not an exception: the training continues.

        Args:
            step: steps done.
            slices: master weights and momenta that this rank writes; none on ranks whose slices
                others write.
            model: for its buffers; running statistics are averaged over the ranks first.
            local_state: tensors that each rank has its own of, such as the objective's queue.
            manifest: JSON values describing the run; what resuming compares.
            in_place: slices on the CPU may be written from where they are, because the caller
                calls `before_update` before they change or go away.
            urgent: nothing else is to be done meanwhile, so the writing need not give way.
            trunk_s: seconds that the trunk may take after the checkpoint exists, also that of the
                save before; afterwards the checkpoint stays without one.
        """
        began = time.monotonic()
        self._trunk_s = trunk_s
        self._join()
        average_running_statistics(model)
        with _all_cores():
            placement = stage(self._staging, slices, model, local_state, in_place)
        partial = self.root / f".step_{step:08d}.{self._attempt}.partial"
        if not self._begin(partial, step, began):
            self._staging.clear()
            return
        job = Job(partial, step, self.trunk, manifest, placement, began, urgent)
        # A daemon: a process that fails elsewhere does not wait for ranks that are gone.
        self._thread = threading.Thread(
            target=self._run, args=(job,), name=f"checkpoint of step {step}", daemon=True
        )
        self._thread.start()

    def before_update(self) -> None:
        """Copies the unwritten part of slices given `in_place`, before they change."""
        if self._staging.live:  # hardly ever: this is asked at every step
            with _all_cores():
                self._staging.copy_live()

    def outcomes(self) -> list[Outcome]:
        """Results of saves that have ended since the last call, on rank 0; none elsewhere."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def wait(self) -> None:
        """Waits on every rank until the last save has ended."""
        self._join()
        distributed.barrier()

    def close(self, seconds: float = 10.0) -> None:
        """Waits at most `seconds` for a running save, without a collective."""
        self._patience = min(self._patience, seconds)
        if self._thread is not None:
            self._thread.join(seconds)
        self._staging.free()

    # --------------------------------------------------------------------------- before writing

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _begin(self, partial: Path, step: int, began: float) -> bool:
        """Makes the folder if there is room; every rank gets the same answer."""
        kinds = self._staging.kinds()
        mine = sum(kind.bytes for kind in kinds.values())
        trunk = sum(kind.bytes for key, kind in kinds.items() if key.startswith("weight/trunk."))
        needed = sum(distributed.gather_lists([mine + trunk]))
        problem = make_room(partial, needed) if distributed.is_main() else None
        problem = distributed.broadcast_object(problem)
        if problem and distributed.is_main():
            seconds = time.monotonic() - began
            self._outcomes.append(
                Outcome(step, checkpoint_folder(self.root, step), problem, seconds)
            )
        return problem is None

    # --------------------------------------------------------------------------- in the thread

    def _run(self, job: Job) -> None:
        if not job.urgent:
            # Of this thread alone, on Linux: the training's threads come first.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        write_rank_file(job.partial, job.placement, self._staging)
        outcome = None
        if distributed.is_main():
            outcome = self._finish(job)
        self._staging.clear()
        if outcome:
            self._outcomes.append(replace(outcome, seconds=time.monotonic() - job.began))

    def _finish(self, job: Job) -> Outcome:
        """Gives the checkpoint its name, then adds the trunk and deletes expired checkpoints."""
        folder = checkpoint_folder(self.root, job.step)
        whole = Outcome(job.step, folder, None, 0.0)
        content = {
            "step": job.step,
            "world_size": distributed.world_size(),
            "trunk": job.trunk,
            "versions": versions(),
            **job.manifest,
        }
        try:
            files = written_files(job.partial, lambda: self._patience)
            write_manifest(job.partial, content, files)
            publish(job.partial, folder)
        # Whatever it is, the training goes on with the checkpoint before.
        except Exception as error:
            shutil.rmtree(job.partial, ignore_errors=True)
            return replace(whole, problem=one_line(error))
        try:
            add_trunk(folder, content, files, self._staging, lambda: self._trunk_s)
        except Exception as error:  # the checkpoint is whole without it
            whole = replace(whole, without_trunk=one_line(error))
        return replace(whole, left_behind=self._prune(folder))

    def _prune(self, folder: Path) -> str | None:
        """Deletes expired checkpoints once `folder` is whole; returns a refusal, or None."""
        try:
            saved = list_checkpoints(self.root)
            here = saved.index(folder)
            for later in saved[here + 1 :]:  # of an attempt that was resumed from before them
                set_aside(later)
            for old in expired(saved[: here + 1], keep=self.keep, keep_every=self.keep_every):
                delete(old)
        except OSError as error:
            return one_line(error)
        return None


@dataclass(frozen=True)
class Job:
    """One checkpoint on its way to the disk."""

    partial: Path
    step: int
    trunk: str
    manifest: Mapping[str, Any]
    placement: Mapping[str, Any]
    began: float
    urgent: bool


def save(
    root: Path,
    *,
    step: int,
    slices: Iterable[Slice],
    model: nn.Module,
    local_state: Mapping[str, Tensor],
    trunk: str,
    manifest: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes one checkpoint and waits for it; the arguments are those of `Saver`.

    Raises:
        CheckpointError: on rank 0, if it could not be written.
    """
    saver = Saver(root, trunk=trunk, keep=keep)
    saver.save(
        step=step,
        slices=slices,
        model=model,
        local_state=local_state,
        manifest=manifest,
        urgent=True,
    )
    saver.wait()
    for outcome in saver.outcomes():
        if outcome.problem:
            raise CheckpointError(f"{outcome.folder} was not written: {outcome.problem}")
    return checkpoint_folder(root, step)


@contextmanager
def _all_cores() -> Iterator[None]:
    """Lets torch copy with this rank's share of the cores: the training waits for the copy."""
    usual = torch.get_num_threads()
    torch.set_num_threads(
        max(usual, len(os.sched_getaffinity(0)) // distributed.local_world_size())
    )
    try:
        yield
    finally:
        torch.set_num_threads(usual)
