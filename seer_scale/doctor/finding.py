"""A finding about one part of a machine: its state, the meaning, the advice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """A row of the report.

    Attributes:
        name: name of the part.
        status: `ok`; `warn`, runs work but slower or without something; `fail`, runs will not work.
        value: as found, in a few words.
        meaning: what follows from it.
        advice: what to do; empty if nothing is to be done.
    """

    name: str
    status: Status
    value: str
    meaning: str
    advice: str = ""


def below(value: float, *, fail: float, warn: float) -> Status:
    """Status of a value that should not be small: `fail` and `warn` below two thresholds."""
    return "fail" if value < fail else "warn" if value < warn else "ok"
