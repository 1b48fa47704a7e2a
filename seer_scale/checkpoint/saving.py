"""Saving while training goes on: a thread of every rank writes what the rank holds.

The stall of a save is the copying that cannot be put off (see `staging`). Every rank writes its
file (see `rank_files`); rank 0 waits for all of them, adds the trunk and the manifest and gives the
folder its name. So a checkpoint is there whole or not at all, and a rank that dies once its file
is written costs nothing.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
from seer_scale.checkpoint.reader import CheckpointReader, lazily
from seer_scale.checkpoint.retention import expired
from seer_scale.checkpoint.staging import Staging
from seer_scale.errors import CheckpointError
from seer_scale.optim.slices import Slice, buffers_without_padding
from seer_scale.parallel.batchnorm import average_running_statistics
from seer_scale.serving import versions, write_trunk
from seer_scale.storage.tensor_file import Stamp, from_tensors

PATIENCE_S = 1800.0  # that rank 0 waits for the reports of other ranks


@dataclass(frozen=True)
class Outcome:
    """How a save ended: `problem` is None once the checkpoint is whole.

    Attributes:
        step: of the checkpoint.
        folder: where it is, or should be.
        problem: why it is not whole.
        seconds: from the call of `save` to the end of the writing.
        left_behind: why an older checkpoint could not be deleted, although this one is whole.
    """

    step: int
    folder: Path
    problem: str | None
    seconds: float
    left_behind: str | None = None


class Saver:
    """Writes the checkpoints of one run; every rank has one and calls the same verbs.

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
            for stale in root.glob(".step_*"):  # of saves and deletions that were killed
                shutil.rmtree(stale, ignore_errors=True)
        # Of this attempt: what a rank of an earlier one may still be writing is not mixed in.
        self._attempt: str = distributed.broadcast_object(secrets.token_hex(4))
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._patience = PATIENCE_S
        self._outcomes: deque[Outcome] = deque()  # rank 0's; its thread appends

    def save(
        self,
        *,
        step: int,
        slices: Iterable[Slice],
        writes_slices: bool,
        model: nn.Module,
        local_state: Mapping[str, Tensor],
        manifest: Mapping[str, Any],
        in_place: bool = False,
        urgent: bool = False,
    ) -> None:
        """Takes the state and starts writing it; waits first for a save that is not done yet.

        A save that cannot be written is an outcome, no exception: the training goes on.

        Args:
            step: steps done.
            slices: this rank's master weights and momenta.
            writes_slices: False on ranks whose slices are copies of another rank's.
            model: for its buffers; running statistics are averaged over the ranks first.
            local_state: tensors that each rank has its own of, such as the objective's queue.
            manifest: JSON values describing the run; what resuming compares.
            in_place: slices on the CPU may be written from where they are, because the caller
                calls `before_update` before they change or go away.
            urgent: nothing else is to be done meanwhile, so the writing need not give way.
        """
        began = time.monotonic()
        self._join()
        average_running_statistics(model)
        with _all_cores():
            placement = self._take(slices if writes_slices else (), model, local_state, in_place)
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
        """Call before slices change that a save was given `in_place`: copies what is unwritten."""
        if self._staging.live:  # hardly ever: this is asked at every step
            with _all_cores():
                self._staging.copy_live()

    def outcomes(self) -> list[Outcome]:
        """On rank 0, the saves that have ended since the last call; elsewhere none."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def wait(self) -> None:
        """Waits on every rank until the last save has ended."""
        self._join()
        distributed.barrier()

    def close(self, seconds: float = 10.0) -> None:
        """Gives a save that is under way `seconds` to end; no collective, for failing runs too."""
        self._patience = min(self._patience, seconds)
        if self._thread is not None:
            self._thread.join(seconds)
        self._staging.free()

    # --------------------------------------------------------------------------- before writing

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @torch.no_grad()
    def _take(
        self,
        slices: Iterable[Slice],
        model: nn.Module,
        local_state: Mapping[str, Tensor],
        in_place: bool,
    ) -> dict[str, Any]:
        """Stages everything; where each slice lies in its tensor."""
        placement: dict[str, Any] = {}
        staging, main = self._staging, distributed.is_main()
        staging.clear()

        def take(key: str, values: Tensor, reads: int, own: bool) -> None:
            on_host = values.device.type == "cpu" and values.is_contiguous()
            if own and on_host:
                staging.keep(key, values)
            elif in_place and on_host:
                staging.hold(key, values, reads)
            else:
                staging.copy(key, values)

        for held in slices:  # one at a time: what is offloaded to disk is there only meanwhile
            part = held.without_padding()
            if not part.values.numel():  # nothing but padding
                continue
            whole = part.values.numel() == math.prod(part.shape)
            twice = main and whole and part.name.startswith("trunk.")  # for trunk/ too
            own = part is not held  # cut out of the padding, so a copy already
            take(f"weight/{part.name}", part.values, 2 if twice else 1, own)
            take(f"momentum/{part.name}", part.momentum, 1, own)
            placement[part.name] = {"shape": list(part.shape), "offset": part.offset}
        if main:
            for name, buffer in buffers_without_padding(model):
                staging.copy(f"weight/{name}", buffer.reshape(-1))
                placement[name] = {"shape": list(buffer.shape), "offset": 0}
        for name, tensor in local_state.items():
            staging.copy(f"local/{name}", tensor)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        staging.free(keep=staging.kinds())  # e.g. of a queue that is no longer there
        return placement

    def _begin(self, partial: Path, step: int, began: float) -> bool:
        """Makes the folder if there is room for the checkpoint; the same answer on every rank."""
        kinds = self._staging.kinds()
        mine = sum(kind.bytes for kind in kinds.values())
        trunk = sum(kind.bytes for key, kind in kinds.items() if key.startswith("weight/trunk."))
        needed = sum(distributed.gather_lists([mine + trunk]))
        problem = make_room(partial, needed) if distributed.is_main() else None
        problem = distributed.broadcast_object(problem)
        if problem and distributed.is_main():
            self._end(step, problem, began)
        return problem is None

    # --------------------------------------------------------------------------- in the thread

    def _run(self, job: Job) -> None:
        if not job.urgent:
            # Of this thread alone, on Linux: the training's threads come first.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        write_rank_file(job.partial, job.placement, self._staging)
        problem = left_behind = None
        try:
            if distributed.is_main():
                self._finish(job, written_files(job.partial, lambda: self._patience))
                left_behind = self._prune(checkpoint_folder(self.root, job.step))
        # Whatever it is, the training goes on with the checkpoint before.
        except Exception as error:
            problem = one_line(error)
            shutil.rmtree(job.partial, ignore_errors=True)
        self._staging.clear()
        if distributed.is_main():
            self._end(job.step, problem, job.began, left_behind)

    def _finish(self, job: Job, files: dict[str, Stamp]) -> None:
        content = {
            "step": job.step,
            "world_size": distributed.world_size(),
            "trunk": job.trunk,
            "versions": versions(),
            **job.manifest,
        }
        kinds, read = lazily(CheckpointReader(job.partial, content), "trunk.")
        held, from_files = self._staging.kinds(), from_tensors(kinds, read)

        def fill(name: str, start: int, target: NDArray[np.uint8]) -> None:
            """From memory if this rank has all of it, else from the files just written."""
            key = f"weight/trunk.{name}"
            if key in held and held[key].numel == kinds[name].numel:
                self._staging.fill(key, start, target)
            else:
                from_files(name, start, target)

        trunk = write_trunk(job.partial / "trunk", kinds, fill, trunk=job.trunk, step=job.step)
        files |= {f"trunk/{name}": written for name, written in trunk.items()}
        write_manifest(job.partial, content, files)
        publish(job.partial, checkpoint_folder(self.root, job.step))

    def _prune(self, folder: Path) -> str | None:
        """Deletes what is not kept, once `folder` is whole; why not, if the disk refuses."""
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

    def _end(
        self, step: int, problem: str | None, began: float, left_behind: str | None = None
    ) -> None:
        folder, seconds = checkpoint_folder(self.root, step), time.monotonic() - began
        self._outcomes.append(Outcome(step, folder, problem, seconds, left_behind))


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
    writes_slices: bool,
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
        writes_slices=writes_slices,
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
    """Lets torch copy with this rank's share of the cores: the training waits for nothing else."""
    usual = torch.get_num_threads()
    torch.set_num_threads(
        max(usual, len(os.sched_getaffinity(0)) // distributed.local_world_size())
    )
    try:
        yield
    finally:
        torch.set_num_threads(usual)
