"""Profiles some steps of a run with torch's profiler: a Chrome trace, and a table of the time.

The trace opens in https://ui.perfetto.dev. Steps outside the range cost a comparison each.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
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

from seer_scale.performance.time_by_kind import NORM_RANGE, time_by_kind

FOLDER = "profile"  # of a run's folder


class Profiler:
    """Profiles the steps `first` to `last`, counted from 1; none unless `span` is given.

    The step before them is profiled too and thrown away: what the profiler does once is in it.

    Args:
        folder: where the files go.
        span: first and last step.
        rank: of this process, for the files' names.
        device: of this process.
        done: is told the files that were written, and a line that sums them up.
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
        """Around the training step `step`."""
        if self._first - 1 <= step <= self._last:
            return self._profiled(step)
        return nullcontext()

    def range(self, name: str) -> AbstractContextManager[None]:
        """Around a part of a step, which is seen in the trace under that name."""
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
        """Ends the profile and writes it, if one is under way."""
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
