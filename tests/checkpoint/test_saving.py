"""Saves beside the training: what was copied is written, failures are outcomes, some stay."""

from __future__ import annotations

import errno
import math
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.engines import build_engine, configuration
from harness.pool import Distributed
from seer_scale import distributed as ranks
from seer_scale import serving
from seer_scale.checkpoint import (
    CheckpointReader,
    Outcome,
    Saver,
    list_checkpoints,
    rank_files,
    saving,
    staging,
)
from seer_scale.checkpoint.folders import SPARE_BYTES
from seer_scale.checkpoint.retention import expired
from seer_scale.optim.slices import Slice
from seer_scale.serving import load_trunk
from seer_scale.storage.tensor_file import TensorFile, copy_bytes, stream_tensors
from tests.checkpoint.test_checkpoint import TRUNK, cut, trained, write
from tests.storage.power_cut import watched


def start(
    saver: Saver,
    step: int,
    model: nn.Module,
    local: dict[str, Tensor] | None = None,
    *,
    in_place: bool = False,
    trunk_s: float = math.inf,
) -> None:
    saver.save(
        step=step,
        slices=cut(model, ranks.rank(), ranks.world_size()),
        model=model,
        local_state=local or {},
        manifest={"state": {"step": step}},
        in_place=in_place,
        trunk_s=trunk_s,
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
    may_write, write = threading.Event(), stream_tensors

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


def save_in_place(saver: Saver, model: nn.Module, slices: list[Slice]) -> None:
    saver.save(
        step=1,
        slices=slices,
        model=model,
        local_state={},
        manifest={"state": {"step": 1}},
        in_place=True,
    )


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
    save_in_place(saver, model, slices)
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


def test_the_optimizer_waits_while_bytes_that_it_changes_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, saver = trained(), saver_of(tmp_path)
    slices = cut(model, 0, 1)
    expected = {part.name: (part.values.clone(), part.momentum.clone()) for part in slices}
    reading, changed = threading.Event(), threading.Event()

    def halting(data: memoryview, start: int, target: Any) -> None:
        half = len(target) // 2
        copy_bytes(data, start, target[:half])
        if half > 1000 and not reading.is_set():  # a tensor of the training, not a counter
            reading.set()
            changed.wait(1)  # in vain: the optimizer waits for this copy
        copy_bytes(data, start + half, target[half:])

    monkeypatch.setattr(staging, "copy_bytes", halting)
    save_in_place(saver, model, slices)
    assert reading.wait(60)
    saver.before_update()
    change(*[tensor for part in slices for tensor in (part.values, part.momentum)])
    changed.set()
    saver.wait()
    assert ended(saver) == [(1, None)]
    reader = CheckpointReader(tmp_path / "step_00000001")
    assert reader.verify() is None
    for name, (values, momentum) in expected.items():
        assert torch.equal(reader.whole(name).view(-1), values), name
        assert torch.equal(reader.whole(name, "momentum").view(-1), momentum), name


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


def test_copies_lie_in_memory_that_is_reserved_at_once() -> None:
    kept = staging.Staging()
    sources = {f"weight/{size}": torch.full((size, 3), float(size)) for size in (40, 7, 900)}
    kept.reserve(sources, pin=False)
    places = {key: tensor.data_ptr() for key, tensor in kept._memory.items()}
    assert len({t.untyped_storage().data_ptr() for t in kept._memory.values()}) < len(sources)
    for key, source in sources.items():
        kept.copy(key, source)
    kept.reserve(sources, pin=False)  # of the next save: nothing new
    assert {key: tensor.data_ptr() for key, tensor in kept._memory.items()} == places
    assert all(torch.equal(kept._now[key], source) for key, source in sources.items())


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


def save_into(root: Path, free: list[int]) -> list[tuple[int, str | None]]:
    """A save for each number of bytes that the disk has free."""
    saver, usage = saver_of(root), shutil.disk_usage(root)
    for step, bytes_ in enumerate(free, start=1):
        there = usage._replace(free=bytes_)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, there=there: there)
            start(saver, step, trained(), {"queue": torch.ones(1000)})
        saver.wait()
    return ended(saver)


def test_the_room_for_a_save_is_that_of_all_ranks_and_of_the_trunk(
    distributed: Distributed, tmp_path: Path
) -> None:
    distributed(save_into, 2, tmp_path, [1 << 40])
    files = sorted((tmp_path / "step_00000001").rglob("*.safetensors"))
    assert [path.name for path in files] == [
        "rank_00000.safetensors",
        "rank_00001.safetensors",
        "trunk.safetensors",
    ]
    size = sum(entry.kind.bytes for path in files for entry in TensorFile(path).entries.values())
    again = tmp_path / "again"
    again.mkdir()
    enough = size + SPARE_BYTES
    (refused, written), others = distributed(save_into, 2, again, [enough - 1, enough])
    assert "GiB free: delete something" in (refused[1] or "")
    assert written == (2, None)
    assert others == []


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


@contextmanager
def slow_trunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, Any]]:
    """Trunks begin, and are written once the event is set."""
    begun, may_write, write = threading.Event(), threading.Event(), stream_tensors

    def late(*args: Any) -> Any:
        begun.set()
        assert may_write.wait(60)
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(serving, "stream_tensors", late)
        yield begun, may_write


def test_a_checkpoint_exists_before_its_trunk_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, saver = trained(), saver_of(tmp_path)
    with slow_trunks(monkeypatch) as (begun, may_write):
        start(saver, 1, model)
        assert begun.wait(60)
        (folder,) = list_checkpoints(tmp_path)
        assert set(whole(folder)) == set(model.state_dict())
        assert not (folder / "trunk").exists()
        assert "trunk/trunk.safetensors" not in CheckpointReader(folder).manifest["files"]
        may_write.set()
        saver.wait()
    assert ended(saver) == [(1, None)]
    assert whole(folder)
    assert "trunk/trunk.safetensors" in CheckpointReader(folder).manifest["files"]
    load_trunk(folder / "trunk")


def test_a_run_that_leaves_owes_no_trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_of(tmp_path)
    with slow_trunks(monkeypatch) as (begun, may_write):
        start(saver, 1, trained())
        assert begun.wait(60)
        threading.Timer(0.5, may_write.set).start()
        start(saver, 2, trained(), trunk_s=0.0)  # ends the trunk of step 1 too
        saver.wait()
    outcomes = saver.outcomes()
    assert [(o.step, o.problem, o.without_trunk) for o in outcomes] == [
        (1, None, "the run was about to end"),
        (2, None, "the run was about to end"),
    ]
    for outcome in outcomes:
        assert whole(outcome.folder)
        assert not list(outcome.folder.glob("trunk*"))


def test_a_trunk_that_cannot_be_written_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(serving, "stream_tensors", full)
    saver = saver_of(tmp_path)
    start(saver, 1, trained())
    saver.wait()
    (outcome,) = saver.outcomes()
    assert outcome.problem is None
    assert "No space left" in (outcome.without_trunk or "")
    assert whole(outcome.folder)


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


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(monkeypatch) as lost:
        for step in (1, 2, 2):
            write(tmp_path, step, local={"queue": torch.ones(3)}, keep=1)
    assert lost == []


def test_only_the_writing_thread_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    write = stream_tensors

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
