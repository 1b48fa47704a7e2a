"""The progress display of rank 0: a bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
RECENT = 20  # last steps that the rate and the ETA are taken from


def duration(seconds: float) -> str:
    """Formats a time as hours:minutes:seconds."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Progress:
    """Shows step, ETA, images/s, loss, learning rate and memory.

    Images/s and ETA are those of the last 20 steps: single steps vary, and the first ones are slow.
    A full disk or a closed terminal loses lines but does not end the run.

    Args:
        total: steps of the whole run.
        done: steps done before.
        stream: where to; standard error unless given.
    """

    def __init__(self, total: int, done: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.total = total
        self.moments = deque([(time.monotonic(), done)], maxlen=RECENT + 1)  # time and step
        self.seconds: deque[float] = deque(maxlen=RECENT)  # that an image took, of every step
        self.last_line = float("-inf")
        self.bar = (
            tqdm(total=total, initial=done, file=self.stream, unit="step", dynamic_ncols=True)
            if self.stream.isatty()
            else None
        )

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of `step`, the last finished step."""
        with suppress(OSError):
            self._update(step, metrics)

    def _update(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        self.moments.append((now, step))
        self.seconds.append(1 / metrics["images_per_second"])
        rate = len(self.seconds) / sum(self.seconds)
        shown = (
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.4g}  "
            f"{rate:.1f} img/s  {metrics['peak_memory_gib']:.2f} GiB"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        if now - self.last_line < SECONDS_BETWEEN_LINES and step != self.total:
            return
        self.last_line = now
        since, first = self.moments[0]
        left = (now - since) / max(1, step - first) * (self.total - step)
        print(
            f"step {step}/{self.total}  {shown}  ETA {duration(left)}",
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
        """Closes the bar and leaves it on the screen."""
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()
