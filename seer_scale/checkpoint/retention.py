"""Retention of checkpoints: the newest few stay, and every m-th stays for good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seer_scale.checkpoint.manifest import step_of


def expired(saved: Sequence[Path], *, keep: int, keep_every: int | None = None) -> list[Path]:
    """Lists the checkpoints of `saved` (oldest first) that may be deleted.

    Args:
        saved: folders of whole checkpoints, oldest first.
        keep: how many of the newest stay.
        keep_every: those of these steps' multiples stay too.
    """
    old = saved[: max(0, len(saved) - keep)]
    return [path for path in old if not keep_every or (step_of(path) or 0) % keep_every]
