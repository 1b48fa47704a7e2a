"""Compares the clock of this machine with that of its disk and of the servers that a run uses."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from seer_scale.doctor.finding import Finding, Status
from seer_scale.storage.disk_refusal import existing_part
from seer_scale.tracking.uri import redact

MOST_SECONDS = 60.0  # a server's Date has whole seconds, and its answer takes a while
REFUSED_SECONDS = 900.0  # S3 and its kind refuse requests that are signed so far off


def check_clock(folder: Path, addresses: Sequence[str], timeout: float) -> Finding:
    """Finds the largest difference between this clock and the others.

    Args:
        folder: where the run writes; it need not exist yet.
        addresses: http(s) addresses of servers; those that do not answer are left out.
        timeout: seconds for each server.
    """
    off = dict(_differences(folder, addresses, timeout))
    if not off:
        return Finding("clock", "ok", "nothing to compare it with", "not checked")
    where, seconds = max(off.items(), key=lambda pair: abs(pair[1]))
    status: Status = "ok" if abs(seconds) <= MOST_SECONDS else "warn"
    meaning = "times of runs and files agree"
    if status == "warn":
        meaning = "times in MLflow and ages of shards are wrong by that"
        if abs(seconds) > REFUSED_SECONDS:
            meaning += ", and object stores refuse signed requests"
    said = "behind" if seconds > 0 else "ahead of"
    return Finding(
        "clock",
        status,
        f"{abs(seconds):.0f} s {said} {where}",
        meaning,
        "" if status == "ok" else "set the clock (chronyc makestep, or timedatectl set-ntp true)",
    )


def _differences(
    folder: Path, addresses: Sequence[str], timeout: float
) -> Iterator[tuple[str, float]]:
    """Names of clocks, and the seconds by which each is ahead of ours."""
    place = existing_part(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".seer-scale-") as file:
            file.write(b"\0")
            file.flush()
            yield str(place), Path(file.name).stat().st_mtime - time.time()
    except OSError:  # another finding says so
        pass
    for address in addresses:
        shown = redact("/".join(address.split("/", 3)[:3]))
        date = _date_of(shown, timeout)
        if date is not None:
            yield shown, date - time.time()


def _date_of(address: str, timeout: float) -> float | None:
    """Seconds since the epoch by a server's clock; None if it does not say."""
    try:
        with urlopen(Request(address, method="HEAD"), timeout=timeout) as answer:
            text = answer.headers.get("Date")
    except HTTPError as error:
        text = error.headers.get("Date")
    except (OSError, HTTPException, ValueError):
        return None
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except ValueError:
        return None
