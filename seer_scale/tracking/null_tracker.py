"""The tracker of a run that is not tracked, and of every rank but 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class NullTracker:
    """Tracker without effect: tracking is off, or the rank is not 0."""

    run_id: str | None = None

    def refused(self) -> str | None:
        """Returns None: nothing is sent."""
        return None

    def problem(self) -> str | None:
        """Returns None: nothing is sent."""
        return None

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        """Returns None at once."""
        return None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Does nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def log_dataset(self, path: str, *, digest: str, images: int, used_for: str) -> None:
        """Does nothing."""

    def log_artifact(self, path: Path | str, folder: str = "") -> None:
        """Does nothing."""

    def log_model(
        self,
        folder: Path | str,
        *,
        step: int,
        tags: Mapping[str, Any] | None = None,
        aliases: Sequence[str] = (),
    ) -> None:
        """Does nothing."""

    def log_checkpoint(self, folder: Path | str, *, step: int, how: str) -> None:
        """Does nothing."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Does nothing."""

    def finish(self, status: str = "FINISHED") -> None:
        """Does nothing."""

    def close(self, status: str = "FINISHED", wait_s: float = 30.0) -> bool:
        """True: nothing is left to send."""
        return True
