"""Reads a few images of a run's collection, as the run will read them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import numpy as np

from seer_scale.data import Source
from seer_scale.data.decode import BadImage, cause_of, decode
from seer_scale.doctor.finding import Finding
from seer_scale.errors import UserError

SLOW_SECONDS = 2.0  # that an image may take, once its shard is there


def check_images(
    name: str, open_source: Callable[[], Source], timeout: float
) -> tuple[Finding, Source | None]:
    """Opens a collection, and reads images of its first, its last and a random shard.

    A folder counts as one shard: its first, its last and a random image are read.

    Args:
        name: name of the finding.
        open_source: opens the collection.
        timeout: seconds for all of it; whatever never answers is left behind.

    Returns:
        The finding, and the opened collection if it could be opened.
    """
    opened: list[Source] = []
    found: list[Finding | Exception] = []

    def look() -> None:
        try:
            opened.append(open_source())
            found.append(_read(name, opened[0]))
        except UserError as error:
            found.append(Finding(name, "fail", "not readable", str(error), "see docs/data.md"))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=look, daemon=True)  # a dead mount keeps it for ever
    thread.start()
    thread.join(timeout)
    if not found:
        silent = Finding(
            name,
            "fail",
            f"no answer within {timeout:g} s",
            "the run would wait for it, at most run.hang_minutes",
            "does its disk or server still answer?",
        )
        return silent, None
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0], opened[0] if opened else None


def _read(name: str, source: Source) -> Finding:
    bad, slowest = [], 0.0
    for index in _chosen(source):
        try:
            source.read(index)  # with its shard, which a run copies once
            began = time.monotonic()
            decode(source.read(index))
            slowest = max(slowest, time.monotonic() - began)
        except (BadImage, OSError) as error:
            bad.append(f"{source.name(index)} ({cause_of(error)})")
    total = f"{len(source):,} images in {len(source.shard_sizes):,} shards"
    if bad:
        return Finding(
            name,
            "fail",
            f"{total}; not usable: {', '.join(bad)}",
            "the run replaces such images, up to data.max_bad_fraction of them",
            "seer-scale data inspect PATH --survey 0 reads them all",
        )
    slow = slowest > SLOW_SECONDS
    return Finding(
        name,
        "warn" if slow else "ok",
        f"{total}; the slowest image took {slowest:.2f} s",
        "the run would wait for images" if slow else "first, last and a random one can be used",
        "copy the shards to a local disk, or set data.cache_dir to one" if slow else "",
    )


def _chosen(source: Source) -> list[int]:
    """Numbers of the images to read, at most three."""
    if len(source.shard_sizes) == 1:
        return sorted({0, random.randrange(len(source)), len(source) - 1})
    ends = np.cumsum(source.shard_sizes)
    # The middle of a random shard, and the two ends of the collection.
    shard = random.randrange(len(ends))
    middle = int(ends[shard]) - (int(source.shard_sizes[shard]) + 1) // 2
    return sorted({0, max(0, middle), len(source) - 1})
