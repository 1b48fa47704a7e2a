"""Saves beside the training: what was copied is written, failures are outcomes, some stay."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.memory import build_engine, configuration
from seer_scale import distributed as ranks
from seer_scale.checkpoint import (
    CheckpointReader,
    Outcome,
    Saver,
    list_checkpoints,
    rank_files,
    saving,
)
from seer_scale.checkpoint.retention import expired
from tests.checkpoint.test_checkpoint import TRUNK, cut, trained

Distributed = Callable[..., list[Any]]


def start(
    saver: Saver,
    step: int,
    model: nn.Module,
    local: dict[str, Tensor] | None = None,
    *,
    in_place: bool = False,
) -> None:
    saver.save(
        step=step,
        slices=cut(model, ranks.rank(), ranks.world_size()),
        writes_slices=True,
        model=model,
        local_state=local or {},
        manifest={"state": {"step": step}},
        in_place=in_place,
    )


def saver_of(root: Path, **more: Any) -> Saver:
    return Saver(root, trunk=TRUNK, **{"keep": 9, **more})


def ended(saver: Saver) -> list[tuple[int, str | None]]:
    return [(outcome.step, outcome.problem) for outcome in saver.outcomes()]


def whole(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    assert reader.verify() is None
    return {name: reader.whole(name) for name in reader.names}


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The threads of saves wait for the event before they write."""
    may_write, write = threading.Event(), rank_files.stream_tensors

    def late(*args: Any) -> Any:
        assert may_write.wait(60)
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rank_files, "stream_tensors", late)
        yield may_write


def test_what_is_written_is_the_moment_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, saver = trained(), saver_of(tmp_path)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with held_back(monkeypatch) as may_write:
        start(saver, 1, model, {"queue": torch.ones(3)})
        with torch.no_grad():  # the training goes on
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.zero_()
        assert list_checkpoints(tmp_path) == []
        assert saver.outcomes() == []
        may_write.set()
        saver.wait()
    (outcome,) = saver.outcomes()
    assert outcome == Outcome(1, tmp_path / "step_00000001", None, outcome.seconds)
    found = whole(outcome.folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_old_checkpoint_that_cannot_be_deleted_is_not_the_new_one_s_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, saver = trained(), saver_of(tmp_path, keep=1)
    start(saver, 1, model)

    def busy(folder: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))

    monkeypatch.setattr(saving, "delete", busy)  # as on NFS while somebody reads it
    start(saver, 2, model)
    saver.wait()
    first, second = saver.outcomes()
    assert (first.problem, first.left_behind) == (None, None)
    assert second.problem is None
    assert "step_00000001" in (second.left_behind or "")
    assert whole(second.folder)


def test_what_is_cut_out_of_padding_is_not_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration("model.trunk=regnety_debug", "model.align_channels=3")
    engine, saver = build_engine(config)[0], saver_of(tmp_path)
    with held_back(monkeypatch) as may_write:
        saver.save(
            step=1,
            slices=engine.slices(),
            writes_slices=True,
            model=engine.model,
            local_state={},
            manifest={},
            in_place=True,
        )
        padded = {held.name for held in engine.slices() if held.padding is not None}
        live = {key.partition("/")[2] for key in saver._staging._live}
        assert padded
        assert live == {held.name for held in engine.slices()} - padded
        saver.before_update()
        change(*[tensor for held in engine.slices() for tensor in (held.values, held.momentum)])
        may_write.set()
        saver.wait()
    assert ended(saver) == [(1, None)]
    fresh = build_engine(config)[0]
    for held in fresh.slices():
        assert torch.equal(
            CheckpointReader(tmp_path / "step_00000001").whole(held.name).view(-1),
            held.without_padding().values,
        )


@torch.no_grad()
def change(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.zero_()


def changed_in_the_middle(root: Path, after: int) -> None:
    """A save in place; the optimizer steps once `after` bytes of slices are written."""
    world, rank = ranks.world_size(), ranks.rank()
    model, saver = trained(), saver_of(root)
    slices = list(cut(model, rank, world))
    tensors = [tensor for part in slices for tensor in (part.values, part.momentum)]
    reached, go_on = threading.Event(), threading.Event()
    fill, done = saver._staging.fill, 0

    def halting(key: str, start: int, target: Any) -> None:
        nonlocal done
        if done >= after and not reached.is_set():
            reached.set()
            assert go_on.wait(60)
        fill(key, start, target)
        done += len(target)

    saver._staging.fill = halting  # type: ignore[method-assign]
    saver.save(
        step=1,
        slices=slices,
        writes_slices=True,
        model=model,
        local_state={},
        manifest={"state": {"step": 1}},
        in_place=True,
    )
    change(*model.buffers())  # the next forward pass
    assert reached.wait(60)
    saver.before_update()
    change(*tensors)  # the optimizer
    go_on.set()
    saver.wait()
    assert not any(tensor.any() for tensor in tensors)
    assert [problem for _, problem in ended(saver)] == ([None] if rank == 0 else [])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("after", [0, 1, 100_000, 170_000])
def test_what_is_unwritten_when_the_optimizer_steps_is_copied_before(
    distributed: Distributed, tmp_path: Path, world_size: int, after: int
) -> None:
    expected = trained()
    distributed(changed_in_the_middle, world_size, tmp_path, after)
    found = whole(tmp_path / "step_00000001")
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name
    reader = CheckpointReader(tmp_path / "step_00000001")
    for part in cut(expected, 0, 1):
        momentum = reader.read(part.name, 0, part.values.numel(), kind="momentum")
        assert torch.equal(momentum, part.momentum), part.name
    trunk = load_file(tmp_path / "step_00000001" / "trunk" / "trunk.safetensors")
    for name, value in expected.state_dict().items():
        if name.startswith("trunk."):
            assert torch.equal(trunk[name.removeprefix("trunk.")], value), name


def test_what_is_written_before_the_optimizer_steps_is_never_copied(tmp_path: Path) -> None:
    model, saver = trained(), saver_of(tmp_path)
    start(saver, 1, model, {"queue": torch.ones(3)}, in_place=True)
    saver.wait()
    saver.before_update()
    buffers = {f"weight/{name}" for name, _ in model.named_buffers()}
    assert saver._staging._memory.keys() == {"local/queue"} | buffers


def test_a_save_waits_for_the_one_before_and_reuses_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, saver = trained(), saver_of(tmp_path)
    with held_back(monkeypatch) as may_write:
        start(saver, 1, model)
        memory = {key: tensor.data_ptr() for key, tensor in saver._staging._memory.items()}
        assert memory.keys() == saver._staging.kinds().keys()
        threading.Timer(0.3, may_write.set).start()
        began = time.monotonic()
        start(saver, 2, trained(seed=1))
        assert time.monotonic() - began >= 0.25
        saver.wait()
    assert ended(saver) == [(1, None), (2, None)]
    assert {key: held.data_ptr() for key, held in saver._staging._memory.items()} == memory
    for step, seed in ((1, 0), (2, 1)):
        weight = whole(tmp_path / f"step_{step:08d}")["prototypes.weight"]
        assert torch.equal(weight, trained(seed).get_parameter("prototypes.weight").detach())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write beyond `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_in_the_middle(root: Path, failing: int) -> list[tuple[int, str | None]]:
    """Three saves; in the second, rank `failing` cannot write its file to the end."""
    saver = saver_of(root)
    for step in (1, 2, 3):
        with largest_file(20_000 if step == 2 and ranks.rank() == failing else 1 << 40):
            start(saver, step, trained(seed=step))
            saver.wait()
    return ended(saver)


@pytest.mark.parametrize(("world_size", "failing"), [(1, 0), (2, 1)])
def test_a_write_that_fails_leaves_the_checkpoint_before(
    distributed: Distributed, tmp_path: Path, world_size: int, failing: int
) -> None:
    outcomes, *others = distributed(fail_in_the_middle, world_size, tmp_path, failing)
    assert [step for step, _ in outcomes] == [1, 2, 3]
    assert outcomes[0][1] is outcomes[2][1] is None
    assert f"rank {failing} could not write its part: [Errno 27] File too large" in outcomes[1][1]
    assert others in ([], [[]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]
    for step in (1, 3):
        weight = whole(tmp_path / f"step_{step:08d}")["prototypes.weight"]
        assert torch.equal(weight, trained(step).get_parameter("prototypes.weight").detach())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_in_the_system_s_words(tmp_path: Path) -> None:
    model, saver = trained(), saver_of(tmp_path)
    partial = tmp_path / f".step_00000001.{saver._attempt}.partial"

    def divert(part: Path, needed: int) -> None:
        part.mkdir()
        (part / "rank_00000.safetensors").symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "make_room", divert)
        start(saver, 1, model)
        saver.wait()
    ((_, problem),) = ended(saver)
    assert problem is not None
    assert "No space left on device" in problem
    assert not partial.exists()


def test_too_little_room_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "seer_scale.checkpoint.saving.shutil.disk_usage", lambda path: usage._replace(free=1000)
    )
    saver = saver_of(tmp_path)
    start(saver, 1, trained())
    ((step, problem),) = ended(saver)
    assert step == 1
    assert problem is not None
    assert "GiB free: delete something" in problem
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_outcome(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    saver = saver_of(tmp_path / "file" / "checkpoints")
    start(saver, 1, trained())
    saver.wait()
    ((_, problem),) = ended(saver)
    assert problem is not None
    assert "Not a directory" in problem


def test_a_rank_that_says_nothing_is_waited_for_no_longer_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PATIENCE_S", 0.2)
    monkeypatch.setattr(saving, "write_rank_file", lambda *given: None)
    saver = saver_of(tmp_path)
    start(saver, 1, trained())
    saver.wait()
    assert ended(saver) == [(1, "rank 0 has not written its part in 0.2 s")]
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_attempt_s_files_are_not_mixed_in(tmp_path: Path) -> None:
    stale = tmp_path / ".step_00000001.0123abcd.partial"
    stale.mkdir()
    (stale / ".rank_00000.json").write_text('{"bytes": 1, "xxh128": ""}')
    saver = saver_of(tmp_path)
    assert not stale.exists()
    start(saver, 1, trained())
    saver.wait()
    assert ended(saver) == [(1, None)]


def test_the_newest_and_every_mth_stay(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, keep=2, keep_every=20)
    model = trained()
    for step in (10, 20, 30, 40, 50, 60, 70):
        start(saver, step, model)
    saver.wait()
    steps = [int(path.name[5:]) for path in list_checkpoints(tmp_path)]
    assert steps == [20, 40, 60, 70]
    folders = [Path(f"step_{step:08d}") for step in (10, 20, 30, 40)]
    assert expired(folders, keep=2) == folders[:2]
    assert expired(folders, keep=1, keep_every=10) == []
    assert expired(folders, keep=9) == []


def test_only_the_writing_thread_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    write = rank_files.stream_tensors

    def spy(*args: Any) -> Any:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return write(*args)

    monkeypatch.setattr(rank_files, "stream_tensors", spy)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    saver = saver_of(tmp_path)
    start(saver, 1, trained())
    saver.wait()
    assert seen == [19]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
