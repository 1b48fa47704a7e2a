"""The progress display of rank 0: a bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Progress:
    """Shows step, ETA, images/s, loss, learning rate and memory.

    A log on a full disk, or a terminal that is gone, loses lines and does not end the run.

    Args:
        total: steps of the whole run.
        done: steps done before.
        stream: where to; standard error unless given.
    """

    def __init__(self, total: int, done: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.total, self.first = total, done
        self.started = time.monotonic()
        self.last_line = float("-inf")
        self.bar = (
            tqdm(total=total, initial=done, file=self.stream, unit="step", dynamic_ncols=True)
            if self.stream.isatty()
            else None
        )

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of `step`, the last one done."""
        with suppress(OSError):
            self._update(step, metrics)

    def _update(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = (
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.4g}  "
            f"{metrics['images_per_second']:.1f} img/s  {metrics['peak_memory_gib']:.2f} GiB"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if now - self.last_line < SECONDS_BETWEEN_LINES and step != self.total:
            return
        self.last_line = now
        left = (now - self.started) / max(1, step - self.first) * (self.total - step)
        print(
            f"step {step}/{self.total}  {shown}  ETA {_duration(left)}",
            file=self.stream,
            flush=True,
        )

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        with suppress(OSError):
            if self.bar is not None:
                self.bar.write(text, file=self.stream)
            else:
                print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()
