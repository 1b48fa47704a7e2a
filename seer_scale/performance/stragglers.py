"""Finds the rank that all others wait for, from the seconds of every rank's own work."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence


class Stragglers:
    """Watches for a straggler, and warns when the same rank stays the slowest.

    Args:
        say: prints a line for the user.
        ratio: least ratio of the slowest rank's work to the median rank's work of a straggler.
        patience: number of consecutive steps with the same straggler before the warning.
    """

    def __init__(
        self, say: Callable[[str], None], *, ratio: float = 1.3, patience: int = 10
    ) -> None:
        self._say, self._ratio, self._patience = say, ratio, patience
        self._rank, self._steps = -1, 0

    def observe(self, seconds: Sequence[float]) -> dict[str, float]:
        """Takes the work of one step and returns the metric `straggler_ratio`.

        The ratio is the slowest rank's work over the median rank's (the lower of two medians).

        Args:
            seconds: seconds of own work of every rank, in rank order.

        Returns:
            The metric; empty for one rank alone or a step without times.
        """
        median = statistics.median_low(seconds)
        if len(seconds) == 1 or median <= 0:
            return {}
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        ratio = seconds[slowest] / median
        if ratio < self._ratio:
            self._rank, self._steps = -1, 0
            return {"straggler_ratio": ratio}
        self._steps = self._steps + 1 if slowest == self._rank else 1
        self._rank = slowest
        if self._steps == self._patience:
            self._say(
                f"warning: rank {slowest} was the slowest in {self._patience} consecutive steps: "
                f"{seconds[slowest]:.3f} s of own work, the median rank {median:.3f} s; all other "
                "ranks wait for it. Check its images, the clock of its device and the other "
                "processes of its node"
            )
        return {"straggler_ratio": ratio}
