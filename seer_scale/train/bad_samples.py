"""A count of unusable images by cause, which ends a run that meets too many of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from seer_scale.data import BadSample
from seer_scale.errors import DataError

WINDOW = 1000  # the share of bad images is taken over at least so many images
MOST_NAMES = 100_000  # that are kept, to tell images apart from meetings


class BadSamples:
    """Counts unusable images of all ranks; every rank counts the same and ends at the same step.

    Args:
        most: largest share of bad images, over the last `WINDOW` images or more.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._steps: deque[tuple[int, int]] = deque()  # (used, bad) images of each step
        self._met: Counter[str] = Counter()  # by cause
        self._names: dict[str, set[str]] = {}  # by cause
        self._kept = 0

    def observe(self, used: int, bad: int) -> None:
        """Counts the images of a step.

        Args:
            used: images that the step used, over all ranks.
            bad: images that could not be used and were replaced, over all ranks.

        Raises:
            DataError: if too many images were bad; the message counts them by cause.
        """
        self._steps.append((used, bad))
        while sum(step[0] for step in self._steps) - self._steps[0][0] >= WINDOW:
            self._steps.popleft()
        all_used, all_bad = (sum(column) for column in zip(*self._steps, strict=True))
        if all_used >= WINDOW and all_bad > self._most * (all_used + all_bad):
            raise DataError(
                f"{all_bad} of the last {all_used + all_bad} images cannot be used, more than "
                f"data.max_bad_fraction={self._most:g} allows (since the start, {self.report()}): "
                "their names are in bad_samples.jsonl; repair data.path or allow more"
            )

    def count(self, samples: Sequence[BadSample]) -> None:
        """Counts a step's bad images, of all ranks."""
        for name, cause in samples:
            self._met[cause] += 1
            names = self._names.setdefault(cause, set())
            if name not in names and self._kept < MOST_NAMES:
                names.add(name)
                self._kept += 1

    def report(self) -> str:
        """Lists the causes, the most frequent first; empty if there are none.

        An image that is met in every epoch is one image.
        """
        return "; ".join(f"{cause}: {self._images(cause)}" for cause, _ in self._met.most_common())

    def _images(self, cause: str) -> str:
        met, images = self._met[cause], len(self._names[cause])
        known = f"{images:,} image{'s' * (images != 1)}"
        if self._kept == MOST_NAMES:
            return f"met {met:,} times"
        return known if met == images else f"{known}, met {met:,} times"
