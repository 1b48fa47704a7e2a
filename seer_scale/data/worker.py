"""A process that runs a rank's pipeline, and the trainer's end of it.

The pipeline runs outside the trainer's process, because a thread that holds the GIL there would
delay the launch of kernels. Whatever happens to the process, the trainer learns it from the pipe
between them: an error of the pipeline arrives as an object, and the death of the process as the end
of the pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from typing import Any

import cv2
import torch

from seer_scale.data import handover
from seer_scale.data.batches import MicroBatch
from seer_scale.data.pipeline import Stalled
from seer_scale.errors import STOP_SIGNALS, DataError

_LAST_WORD_S = 5.0  # seconds that a process that has closed its pipe may take to be gone
# Names of sockets have at most 107 bytes, of which the fork server's need 32 below TMPDIR.
_LONGEST_FOLDER = 75
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


class _Crashed(str):
    """The traceback of an error in the process that nobody has expected."""


class Worker(Iterator[MicroBatch | Stalled]):
    """Iterates over what a pipeline yields in a process of its own, which `close` ends.

    Args:
        items: the pipeline; is pickled.
        ahead: micro-batches that may wait for the trainer, each in shared memory.

    Attributes:
        process: the process of the pipeline.

    Raises:
        DataError: no process can be started.
    """

    def __init__(self, items: Iterable[MicroBatch | Stalled], ahead: int) -> None:
        context = _context()
        self._pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, items, ahead), daemon=True)
        with _short_temporary_folder(), _stop_signals_blocked():
            try:
                self.process.start()
            except OSError as error:
                raise DataError(
                    f"no process for loading images can be started ({error.strerror or error}; "
                    f"TMPDIR is {tempfile.gettempdir()}): set TMPDIR to a folder that exists and "
                    f"whose path has at most {_LONGEST_FOLDER} bytes, or set data.workers=0"
                ) from error
        there.close()  # so that the pipe ends with the process
        # Also for who forgets `close`: the process would not hear a polite SIGTERM.
        util.Finalize(self, self.process.kill, exitpriority=0)

    def __next__(self) -> MicroBatch | Stalled:
        """Returns the next item.

        Raises:
            DataError: what the pipeline raised; or the process is gone.
        """
        try:
            item: Any = handover.receive(self._pipe)
            if isinstance(item, MicroBatch):
                self._pipe.send_bytes(b"taken")
        except (EOFError, ConnectionError):
            raise self._lost() from None
        if isinstance(item, DataError):
            raise item
        if isinstance(item, _Crashed):
            raise RuntimeError(f"the process that loads images failed:\n{item}")
        found: MicroBatch | Stalled = item
        return found

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self.process.kill()
        self.process.join(_LAST_WORD_S)

    def _lost(self) -> DataError:
        self.process.join(_LAST_WORD_S)
        code = self.process.exitcode
        how = "ended"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        elif code is not None:
            how = f"ended with status {code}"
        memory = ", which the system sends where memory runs out" if code == -signal.SIGKILL else ""
        return DataError(
            f"the process that loads images {how}{memory}: give the machine or container more "
            "memory, or lower data.workers, data.prefetch or train.micro_batch_size, and go on "
            "with --resume auto"
        )


# --------------------------------------------------------------------------------- in the process


def _serve(pipe: Connection, items: Iterable[MicroBatch | Stalled], ahead: int) -> None:
    """Sends all items; after `ahead` micro-batches, each waits until an earlier one is taken."""
    _settle()
    sent = 0
    try:
        for item in _safely(items):
            if isinstance(item, MicroBatch):
                if sent >= ahead:
                    pipe.recv_bytes()
                sent += 1
            try:
                handover.send(pipe, item)
            except DataError as error:
                handover.send(pipe, error)
                break
        while True:  # the trainer reads the last item before the pipe may end
            pipe.recv_bytes()
    except (EOFError, ConnectionError):  # the trainer is gone
        os._exit(1)


def _safely(items: Iterable[MicroBatch | Stalled]) -> Iterator[Any]:
    """Yields all items; an error of their making becomes the last one."""
    try:
        yield from items
    except DataError as error:
        yield error
    except Exception:
        yield _Crashed(traceback.format_exc())


def _settle() -> None:
    """Makes this process a quiet neighbour of the trainer, which ends with it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # The pipeline has threads of its own.
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    # Batches are prepared ahead, so the trainer's collectives may go first.
    os.nice(19)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


# ---------------------------------------------------------------------------------- its beginning


def _context() -> Any:
    """Returns a context that forks processes from a clean server process.

    A fork of the trainer would copy the locks of its communication threads in an unknown state; a
    spawned process would import torch again for every collection.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Blocks stop signals; processes that are started inside inherit the block from the first.

    A launcher or batch system sends the signals to all processes of a run, but the trainer still
    needs its next micro-batches then.
    """
    resource_tracker.ensure_running()  # here, because it unblocks them when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """Lets temporary files lie in a folder whose path is short, if that of TMPDIR is too long."""
    usual, folders = tempfile.gettempdir(), _SHORT_FOLDERS
    if len(os.fsencode(usual)) > _LONGEST_FOLDER:
        usable = (folder for folder in folders if os.access(folder, os.W_OK | os.X_OK))
        tempfile.tempdir = next(usable, usual)
    try:
        yield
    finally:
        tempfile.tempdir = usual
