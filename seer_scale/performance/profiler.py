"""Profiles some steps of a run with torch's profiler: a Chrome trace, and a table of the time.

The trace opens in https://ui.perfetto.dev. A step outside the range costs one comparison.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.profiler import ProfilerActivity, record_function

from seer_scale.errors import ConfigError
from seer_scale.performance.time_by_kind import NORM_RANGE, time_by_kind

FOLDER = "profile"  # in the run folder


def check_ranks(ranks: Sequence[int], world_size: int) -> None:
    """Refuses to profile a rank that the run does not have.

    Raises:
        ConfigError: if a number of `ranks` is not below `world_size`.
    """
    if max(ranks) >= world_size:
        raise ConfigError(
            f"profile.ranks is {list(ranks)}, but the run has {world_size} "
            f"rank{'s' * (world_size != 1)}: name ranks from 0 to {world_size - 1}"
        )


class Profiler:
    """Profiles a range of steps of this rank.

    The step before the range is profiled too and discarded, since it contains the profiler's
    start-up.

    Args:
        folder: folder for the files.
        span: first and last step, counted from 1; None profiles nothing.
        rank: rank of this process, for the names of the files.
        device: device of this process.
        done: called at the end with the written files and a summary of one line.
    """

    def __init__(
        self,
        folder: Path,
        span: tuple[int, int] | None,
        *,
        rank: int,
        device: torch.device,
        done: Callable[[list[Path], str], None],
    ) -> None:
        self._first, self._last = span or (1, 0)
        self._folder, self._rank, self._device, self._done = folder, rank, device, done
        self._profile: torch.profiler.profile | None = None
        self._hooks: list[Any] = []
        self._ranges: list[record_function] = []

    def step(self, step: int) -> AbstractContextManager[None]:
        """Context manager for the training step `step`."""
        if self._first - 1 <= step <= self._last:
            return self._profiled(step)
        return nullcontext()

    def range(self, name: str) -> AbstractContextManager[None]:
        """Context manager for a part of a step; `name` is its name in the trace."""
        return record_function(name) if self._profile else nullcontext()

    @contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        if self._profile is None:
            self._begin(step)
        assert self._profile is not None
        with record_function(f"train step {step}"):
            yield
        if step < self._last:
            self._profile.step()
        else:
            self.close()

    def close(self) -> None:
        """Stops a running profile and writes its files."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        for hook in self._hooks:
            hook.remove()
        profile.stop()
        self._last = 0

    def _begin(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        warmup = int(step < self._first)
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=0, warmup=warmup, active=self._last - step + 1 - warmup
            ),
            on_trace_ready=self._write,
        )
        self._hooks = [
            register_module_forward_pre_hook(self._open_range),
            register_module_forward_hook(self._close_range, always_call=True),
        ]
        self._profile.start()

    def _write(self, profile: torch.profiler.profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"rank_{self._rank:05d}.trace.json.gz"
        profile.export_chrome_trace(str(trace))
        with gzip.open(trace) as file:
            found = time_by_kind(json.load(file)["traceEvents"])
        table = trace.with_name(f"rank_{self._rank:05d}.md")
        table.write_text(
            f"{found.steps} steps from step {self._first}, rank {self._rank}, "
            f"{self._device.type}, profiled: slower than others\n\n{found.markdown()}"
        )
        most = sorted(found.by_kind.items(), key=lambda item: -item[1])[:4]
        shares = ", ".join(f"{kind} {seconds / found.seconds:.0%}" for kind, seconds in most)
        self._done([trace, table], f"profiled {found.steps} steps, {shares}: see {table}")

    def _open_range(self, module: nn.Module, _: Any) -> None:
        if isinstance(module, _BatchNorm):
            self._ranges.append(record_function(NORM_RANGE))
            self._ranges[-1].__enter__()  # type: ignore[no-untyped-call]

    def _close_range(self, module: nn.Module, *_: Any) -> None:
        if isinstance(module, _BatchNorm):
            self._ranges.pop().__exit__(None, None, None)
