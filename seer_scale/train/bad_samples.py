"""Counts images that could not be used, by cause, and ends a run that meets too many of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from seer_scale.errors import DataError

WINDOW = 1000  # images, at least, that the share is taken over


class BadSamples:
    """The same on every rank, so that all of them end at the same step.

    Args:
        most: share of the images read that may be bad, over the last `WINDOW` images or more.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._steps: deque[tuple[int, int]] = deque()  # images used and bad ones, a step
        self.causes: Counter[str] = Counter()

    def observe(self, used: int, bad: int) -> None:
        """Takes in a step.

        Raises:
            DataError: if too many were bad; says how many of which cause.
        """
        self._steps.append((used, bad))
        while sum(step[0] for step in self._steps) - self._steps[0][0] >= WINDOW:
            self._steps.popleft()
        all_used, all_bad = (sum(column) for column in zip(*self._steps, strict=True))
        if all_used >= WINDOW and all_bad > self._most * (all_used + all_bad):
            raise DataError(
                f"{all_bad} of the last {all_used + all_bad} images cannot be used, more than "
                f"data.max_bad_fraction={self._most:g} allows; since the start {self.report()}: "
                "their names are in bad_samples.jsonl; mend data.path or allow more"
            )

    def count(self, causes: Sequence[str]) -> None:
        """Takes in the causes of a step's bad images, of all ranks."""
        self.causes.update(causes)

    def report(self) -> str:
        """The causes with their numbers, most frequent first."""
        return ", ".join(f"{count} x {cause}" for cause, count in self.causes.most_common())
