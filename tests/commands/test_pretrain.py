"""What `pretrain` makes of a configuration before the training begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.jobs import arguments, write_images
from seer_scale import distributed
from seer_scale.commands import pretrain


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
