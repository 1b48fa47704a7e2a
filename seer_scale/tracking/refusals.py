"""Records that MLflow refused for good: how many, and why, in one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REJECTED = "rejected.jsonl"
COUNT = "rejected"  # in sent.json: refusals by its server, of all senders


def keep_refusal(folder: Path, line: Mapping[str, Any]) -> None:
    """Appends a refused record with its reason to the file in `<run_dir>/tracking`."""
    with (folder / REJECTED).open("a") as file:
        file.write(json.dumps(line) + "\n")


def count_refusals(sent: Mapping[str, Any], folder: Path) -> int:
    """Number of records that the server of `sent` refused.

    Args:
        sent: content of `sent.json`.
        folder: `<run_dir>/tracking`, whose file counts where an older sender wrote no number.
    """
    if COUNT in sent:
        return int(sent[COUNT])
    return len(_lines(folder)) if sent.get("offset") else 0


def refusals(sent: Mapping[str, Any], folder: Path) -> str | None:
    """One sentence with the count, the last reason and the file; None if nothing was refused.

    Args:
        sent, folder: arguments of `count_refusals`.
    """
    count, lines = count_refusals(sent, folder), _lines(folder)
    if not count:
        return None
    try:
        reason = json.loads(lines[-1])["reason"]
    except (IndexError, ValueError, KeyError):  # deleted or damaged by hand
        reason = "not known"
    what = "1 record" if count == 1 else f"{count} records"
    return (
        f"MLflow refused {what} of this run for good (the last: {reason}): {folder / REJECTED} "
        "holds each with its reason"
    )


def _lines(folder: Path) -> list[str]:
    try:
        return (folder / REJECTED).read_text().splitlines()
    except FileNotFoundError:
        return []
