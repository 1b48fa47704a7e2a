"""The process of a loader: what goes wrong in it, or between it and the trainer, is a sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from harness.jobs import ROOT
from harness.mounts import with_tmpfs
from seer_scale.data.batches import BadSample, MicroBatch
from seer_scale.data.worker import Worker
from seer_scale.errors import DataError

SECONDS = 100  # that a process of a test may take; all of them take a few on an idle machine


def micro_batch(number: int, size: int) -> MicroBatch:
    """Two resolutions of crops that are `number` everywhere; `size` bytes together."""
    crops = [torch.full((size // 12, 1, 2, 3), number % 256, dtype=torch.uint8) for _ in range(2)]
    rows = [torch.full((4, 2), float(number)), torch.full((2, 2), float(number))]
    return MicroBatch(crops, rows, torch.tensor([number, -1]), [BadSample("x", str(number))])


class Batches:
    """Micro-batches without end; each is written down when it is made."""

    def __init__(self, size: int, record: Path | None = None) -> None:
        self.size, self.record = size, record

    def __iter__(self) -> Iterator[MicroBatch]:
        number = 0
        while True:
            if self.record is not None:
                with self.record.open("a") as file:
                    file.write("made\n")
            yield micro_batch(number, self.size)
            number += 1


class Broken:
    """A pipeline with a mistake in its second micro-batch."""

    def __iter__(self) -> Iterator[MicroBatch]:
        yield micro_batch(0, 12)
        raise ZeroDivisionError("nobody expects this")


def assert_is(batch: object, number: int, size: int) -> None:
    expected = micro_batch(number, size)
    assert isinstance(batch, MicroBatch)
    assert batch.parameters is not None
    assert expected.parameters is not None
    for ours, theirs in zip(
        [*batch.crops, *batch.parameters, batch.sample_ids],
        [*expected.crops, *expected.parameters, expected.sample_ids],
        strict=True,
    ):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert batch.bad == expected.bad


def python(code: str, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-c", f"from tests.data.test_worker import *\n{code}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_micro_batches_arrive_as_they_are_and_keep_their_memory() -> None:
    worker = Worker(Batches(120), 2)
    kept = [next(worker) for _ in range(10)]
    worker.close()
    for number, batch in enumerate(kept):
        assert_is(batch, number, 120)
    assert isinstance(kept[0], MicroBatch)
    kept[0].crops[0].fill_(7)  # may be written to, and belongs to nobody else
    assert_is(kept[1], 1, 120)


def test_no_more_micro_batches_wait_than_asked_for(tmp_path: Path) -> None:
    record, ahead, taken = tmp_path / "made", 3, 2
    worker = Worker(Batches(12, record), ahead)
    for _ in range(taken):
        next(worker)
    most = taken + ahead + 1  # and the one that waits for its turn
    deadline = time.monotonic() + SECONDS
    while (made := len(record.read_text().splitlines())) < most and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert made == len(record.read_text().splitlines()) == most
    worker.close()


# 40 micro-batches of 8 MB ahead are 320 MB.
MANY = """
worker = Worker(Batches(8 << 20), 40)
kept = [next(worker) for _ in range(60)]
for number, batch in enumerate(kept):
    assert_is(batch, number, 8 << 20)
print("all there")
"""


def test_a_container_s_shared_memory_of_64_mb_is_no_limit() -> None:
    """A real mount: torch's own sharing loses a micro-batch there, and the trainer waits on."""
    done = python(MANY, *with_tmpfs("/dev/shm", "64m"))
    assert done.stdout == "all there\n", done.stderr


@pytest.mark.long
@pytest.mark.parametrize("length", [76, 200])
def test_a_long_tmpdir_is_no_limit(tmp_path: Path, length: int) -> None:
    """A socket's name has at most 107 bytes, and Python's fork server puts its own into TMPDIR."""
    folder = tmp_path / ("x" * (length - len(str(tmp_path)) - 1))
    folder.mkdir()
    code = "worker = Worker(Batches(12), 1)\nassert_is(next(worker), 0, 12)\nprint('there')"
    done = python(code, TMPDIR=str(folder))
    assert done.stdout == "there\n", done.stderr


def test_a_failure_to_share_is_a_sentence() -> None:
    """A real one: the system lets the process write no file of more than a kilobyte."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
worker = Worker(Batches(1 << 20), 2)
try:
    next(worker)
except DataError as error:
    print(error)
"""
    done = python(code)
    assert done.stdout.startswith("a micro-batch of 1.0 MiB cannot be handed to the trainer (File")
    assert "data.workers=0" in done.stdout
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_is_a_sentence(signum: signal.Signals) -> None:
    worker = Worker(Batches(12), 2)
    next(worker)
    assert worker.process.pid is not None
    os.kill(worker.process.pid, signum)
    with pytest.raises(DataError) as caught:
        list(islice(worker, 10))  # those that had arrived before may still be used
    said = str(caught.value)
    assert said.startswith(f"the process that loads images was ended by {signum.name}")
    assert ("memory runs out" in said) == (signum == signal.SIGKILL)
    assert "data.prefetch" in said
    worker.close()


def test_a_mistake_of_ours_arrives_with_its_traceback() -> None:
    worker = Worker(Broken(), 2)
    assert_is(next(worker), 0, 12)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: nobody expects this") as caught:
        next(worker)
    assert "Traceback" in str(caught.value)
    worker.close()


def test_a_loader_that_nobody_closes_does_not_hold_up_the_end() -> None:
    done = python("worker = Worker(Batches(12), 1)\nnext(worker)\nprint('left')")
    assert (done.stdout, done.returncode) == ("left\n", 0), done.stderr
