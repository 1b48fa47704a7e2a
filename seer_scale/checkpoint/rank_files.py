"""Each rank's file of a checkpoint, and the report beside the file, which rank 0 waits for.

Ranks meet in the checkpoint's folder and not in a collective, which would race with the
collectives of the training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from seer_scale import distributed
from seer_scale.checkpoint.manifest import one_line, rank_file
from seer_scale.checkpoint.placement import SLICES, join_reports, reported
from seer_scale.checkpoint.staging import Staging
from seer_scale.errors import CheckpointError
from seer_scale.storage.atomic import replaced_file
from seer_scale.storage.tensor_file import Stamp, stamp, stream_tensors

_POLL_S = 0.05


def write_rank_file(partial: Path, placement: Mapping[str, Any], staging: Staging) -> None:
    """Writes this rank's tensors, then the report; a failure is reported too.

    Args:
        partial: folder of the checkpoint on its way.
        placement: where each slice lies in its tensor, as JSON has it.
        staging: the slices.
    """
    rank = distributed.rank()
    path = rank_file(partial, rank)
    try:
        metadata = {"placement": json.dumps(placement)}
        kinds = staging.kinds()
        written = stream_tensors(path, kinds, staging.fill, metadata)
        report: dict[str, Any] = {**written._asdict(), "slices": reported(placement, kinds)}
    except Exception as error:
        # Room for the report, on a disk that is full.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        report = {"problem": one_line(error)}
    # If the report cannot be written either, rank 0 stops waiting after a time.
    with suppress(OSError), replaced_file(_report(partial, rank)) as fresh:
        fresh.write_text(json.dumps(report))


def written_files(partial: Path, patience_s: Callable[[], float]) -> dict[str, Stamp]:
    """Waits for the reports of all ranks; returns the stamps of their files and of the index.

    Args:
        partial: folder of the checkpoint on its way.
        patience_s: seconds that a rank may take; asked again and again, as it may get less.

    Raises:
        CheckpointError: if a rank could not write, or says nothing for too long.
    """
    files: dict[str, Stamp] = {}
    slices: list[dict[str, list[Any]]] = []
    began = time.monotonic()
    for rank in range(distributed.world_size()):
        path = _report(partial, rank)
        while not path.exists():
            if time.monotonic() - began > patience_s():
                raise CheckpointError(f"rank {rank} has not written its part in {patience_s():g} s")
            time.sleep(_POLL_S)
        report = json.loads(path.read_text())
        if "problem" in report:
            raise CheckpointError(f"rank {rank} could not write its part: {report['problem']}")
        slices.append(report.pop("slices"))
        files[rank_file(partial, rank).name] = Stamp(**report)
    for rank in range(distributed.world_size()):
        _report(partial, rank).unlink()
    if index := join_reports(slices):
        with replaced_file(partial / SLICES) as fresh:
            fresh.write_text(index)
        files[SLICES] = stamp(partial / SLICES)
    return files


def _report(folder: Path, rank: int) -> Path:
    return folder / f".rank_{rank:05d}.json"
