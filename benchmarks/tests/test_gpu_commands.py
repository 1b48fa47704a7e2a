"""The three commands for GPUs: what they say of GPUs that torch cannot use, and how they start."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import Mock, patch

import pytest
import torch

from benchmarks import bench_gpu, gpu_10b, gpu_check, record
from benchmarks.gpu_check import work
from seer_scale.performance.cuda_allocator import SETTING, VARIABLES

OLD = "torch cannot use this machine's GPUs (too old), so the CPU computes everything"
COMMANDS = [gpu_check, bench_gpu, gpu_10b]


class StartedError(Exception):
    """The GPU is used for the first time."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_driver_that_is_too_old_is_said(
    command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "unused_gpus", lambda: OLD)
    monkeypatch.setattr(sys, "argv", [command.__name__])
    assert command.main() == 1
    (line,) = "".join(capsys.readouterr()).splitlines()
    assert line.startswith(f"{OLD}, nothing was ")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("own", [None, "max_split_size_mb:64"])
def test_a_gpu_is_started_as_by_a_training(
    command: Any, own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> NoReturn:
        expected = [None, own] if own else [SETTING, None]
        assert [os.environ.get(name) for name in VARIABLES] == expected
        raise StartedError

    watchdog = Mock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("faulthandler.dump_traceback_later", watchdog)
    monkeypatch.setattr(record, "environment", Mock(side_effect=AssertionError("too early")))
    monkeypatch.setattr(command, "start_gpu", start)
    monkeypatch.setattr(sys, "argv", ["command"])
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    users = {VARIABLES[1]: own} if own else {}
    # The ranks of `gpu_check` start theirs, not the command.
    run = partial(work, 0, 1, 0, [], "cuda", 1, Path()) if command is gpu_check else command.main
    with patch.dict(os.environ, others | users, clear=True), pytest.raises(StartedError):
        run()
    assert watchdog.called is (command is not gpu_check)  # which has limits of its own
