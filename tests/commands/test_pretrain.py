"""What `pretrain` makes of a configuration before the training begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from harness.jobs import arguments, write_images
from seer_scale import distributed
from seer_scale.commands import pretrain
from seer_scale.distributed import failure
from seer_scale.errors import UserError
from seer_scale.train import build


class MeetingError(Exception):
    """The ranks would meet now."""


@pytest.mark.parametrize(("patience", "expected"), [(5, 30), (15, 30), (45, 90)])
def test_collectives_wait_longer_than_the_watchdog_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int, expected: float
) -> None:
    given: list[float] = []

    def init(timeout_minutes: float, threads: int | None) -> None:
        given.append(timeout_minutes)
        raise MeetingError

    monkeypatch.setattr(distributed, "init", init)
    write_images(tmp_path / "images")
    line = arguments(tmp_path / "images", tmp_path / "run", f"run.hang_minutes={patience}")
    with pytest.raises(MeetingError):
        pretrain.run(list(line))
    assert given == [expected]


def test_full_memory_of_a_gpu_leaves_a_snapshot_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observers: list[Callable[..., None]] = []

    def end(error: BaseException) -> NoReturn:  # which ends pytest otherwise
        raise error

    def train(*_: object, **__: object) -> NoReturn:
        for observer in observers:  # as torch calls them when an allocation fails
            observer(0, 1 << 31, 1 << 36, 1 << 20)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    attach = "_cuda_attach_out_of_memory_observer"
    monkeypatch.setattr(torch._C, attach, observers.append, raising=False)
    monkeypatch.setattr(distributed, "init", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(build, "train", train)
    monkeypatch.setattr(failure, "end", end)
    write_images(tmp_path / "images")
    with pytest.raises(UserError) as raised:
        pretrain.run(arguments(tmp_path / "images", tmp_path / "run"))
    path = tmp_path / "run" / "out_of_memory" / "rank_0.pickle"
    assert "a rank ran out of GPU memory (CUDA out of memory)" in str(raised.value)
    assert str(raised.value).endswith(f"; what the GPU's memory held is in {path}")
    assert path.stat().st_size > 0
