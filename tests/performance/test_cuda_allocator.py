"""Settings of CUDA's allocator: made before torch is imported, and never over the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seer_scale.performance.cuda_allocator import SETTING, VARIABLES, undo_if_unsupported

# Runs the command up to its first import of torch, and prints what torch would read.
PROGRAM = """
import builtins, os, sys
from seer_scale.commands.pretrain import main

honest = builtins.__import__

def watched(name, *rest, **more):
    if name == "torch":
        print({name: os.environ.get(name) for name in sys.argv[1].split()})
        sys.exit()
    return honest(name, *rest, **more)

builtins.__import__ = watched
main(["--recipe", "debug", "run.dir=unused", "data.path=unused"])
"""


@pytest.mark.parametrize("given", [{}, *({name: "max_split_size_mb:64"} for name in VARIABLES)])
def test_a_training_sets_it_before_torch_unless_the_user_did(given: dict[str, str]) -> None:
    others = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, " ".join(VARIABLES)],
        env={**others, **given},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = given or {VARIABLES[0]: SETTING}
    assert done.stdout.strip() == str({name: expected.get(name) for name in VARIABLES})


class Driver:
    """Stands for torch.empty on a GPU whose driver refuses to extend segments.

    The refusal ends when torch, which is real here, has been told to fix their size.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, error: RuntimeError | None, *, ends: bool
    ) -> None:
        self.error, self.ends = error, ends
        self.asked: list[torch.device] = []
        self.told: list[str] = []
        self.tell = torch._C._accelerator_setAllocatorSettings
        patch.setenv(VARIABLES[0], SETTING)
        patch.setattr(torch, "empty", self)
        patch.setattr(torch._C, "_accelerator_setAllocatorSettings", self.set)

    def set(self, text: str) -> None:
        self.tell(text)
        self.told.append(text)

    def __call__(self, size: int, device: torch.device) -> None:
        self.asked.append(device)
        if self.error and not (self.ends and self.told):
            raise self.error


def test_a_driver_that_cannot_extend_segments_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("CUDA driver error: operation not supported\nmore")
    driver = Driver(monkeypatch, error, ends=True)
    assert undo_if_unsupported(3) == (
        "the driver of GPU 3 cannot extend segments of memory (CUDA driver error: operation not "
        "supported), so the run goes on without: gaps between tensors may take memory that no "
        "plan counts; set PYTORCH_ALLOC_CONF=expandable_segments:False to leave the attempt out"
    )
    assert driver.asked == [torch.device("cuda", 3)] * 2
    assert driver.told == ["expandable_segments:False"]


def test_a_driver_that_can_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, None, ends=False)
    assert undo_if_unsupported(0) is None
    assert (len(driver.asked), driver.told) == (1, [])


def test_another_fault_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, RuntimeError("CUDA error: device is busy"), ends=False)
    with pytest.raises(RuntimeError, match="device is busy"):
        undo_if_unsupported(0)


def test_full_memory_and_the_users_own_setting_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(monkeypatch, torch.OutOfMemoryError("full"), ends=False)
    assert undo_if_unsupported(0) is None
    monkeypatch.setenv(VARIABLES[0], "expandable_segments:True,max_split_size_mb:64")
    assert undo_if_unsupported(0) is None
    assert (len(driver.asked), driver.told) == (1, [])
