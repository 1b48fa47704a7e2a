"""Finds the rank that the others wait for, from every rank's own work of a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence


class Stragglers:
    """Watches who is slowest, and says so once it is always the same rank.

    Args:
        say: tells the user something.
        ratio: of the slowest rank's work to the median rank's, from which it is a straggler.
        patience: steps in a row with the same straggler before it is named.
    """

    def __init__(
        self, say: Callable[[str], None], *, ratio: float = 1.3, patience: int = 10
    ) -> None:
        self._say, self._ratio, self._patience = say, ratio, patience
        self._rank, self._steps = -1, 0

    def observe(self, seconds: Sequence[float]) -> dict[str, float]:
        """Takes a step's work of every rank, in rank order; the metric that follows from it.

        `straggler_ratio` is the slowest rank's work over the median's (the lower one's, where there
        are two in the middle). One rank alone has none, and neither has a step without times.
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
                f"warning: rank {slowest} was the slowest in {self._patience} steps in a row: "
                f"{seconds[slowest]:.3f} s of work of its own, the median rank {median:.3f} s; "
                "all others wait for it. Look at its images, its device's clock and what else runs "
                "on its node"
            )
        return {"straggler_ratio": ratio}
