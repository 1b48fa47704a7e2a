"""Where the elements of every tensor lie among the rank files of a checkpoint.

Rank 0 joins what the ranks report into one small file, `slices.json`, so that a rank that resumes
opens the files it needs and no others. Checkpoints without it are indexed from all headers.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from seer_scale.storage.tensor_file import DTYPE_NAMES, DTYPES, Kind, TensorFile

SLICES = "slices.json"
WEIGHT, MOMENTUM = "weight/", "momentum/"


class Run(NamedTuple):
    """`files` files from that of `rank` on, which hold `length` elements each, from `offset` on."""

    rank: int
    files: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Element behind the last one."""
        return self.offset + self.files * self.length


class Part(NamedTuple):
    """The `length` elements of a tensor in one rank's file, from `offset` on."""

    rank: int
    offset: int
    length: int


class Row(NamedTuple):
    """One tensor: its kind, whether it has a momentum, and its runs in the order of elements."""

    kind: Kind
    momentum: bool
    runs: list[Run]

    def parts(self, low: int, high: int) -> Iterator[Part]:
        """Yields the parts that hold elements `low` to `high`."""
        first = max(0, bisect_right(self.runs, low, key=lambda run: run.offset) - 1)
        for run in self.runs[first:]:
            skipped = max(0, (low - run.offset) // run.length)
            for index in range(skipped, run.files):
                offset = run.offset + index * run.length
                if offset >= high:
                    return
                yield Part(run.rank + index, offset, run.length)

    def problem(self) -> str | None:
        """Describes the first gap, overlap or lack of elements; None if there is none."""
        end = 0
        for run in self.runs:
            if run.offset != end:
                return f"the slices of %s leave a gap or overlap at element {min(run.offset, end)}"
            end = run.end
        if end != self.kind.numel:
            return f"it holds {end} of the {self.kind.numel} elements of %s"
        return None


Placement = dict[str, Row]


def reported(placement: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, list[Any]]:
    """Returns a rank's slices for its report, by name: offset and length.

    The rank that has a tensor's first element adds type, shape and whether there is a momentum.

    Args:
        placement: as in the metadata of the rank's file.
        kinds: kinds of the tensors in the rank's file.
    """
    rows: dict[str, list[Any]] = {}
    for name, place in placement.items():
        dtype, (length,) = kinds[WEIGHT + name]
        rows[name] = [place["offset"], length]
        if place["offset"] == 0:
            rows[name] += [DTYPE_NAMES[dtype], place["shape"], MOMENTUM + name in kinds]
    return rows


def join_reports(reports: Sequence[Mapping[str, list[Any]]]) -> str | None:
    """Joins the slices that the ranks report, in rank order, to the text of `SLICES`.

    Returns:
        None if the elements do not follow each other in rank order, or some are missing.
    """
    rows: dict[str, Row] = {}
    for rank, slices in enumerate(reports):
        for name, (offset, length, *first) in slices.items():
            if first:
                dtype, shape, momentum = first
                rows[name] = Row(Kind(DTYPES[dtype], tuple(shape)), momentum, [])
            runs = rows[name].runs if name in rows else []
            if offset != (runs[-1].end if runs else 0):
                return None
            last = runs[-1] if runs else None
            if last and (last.rank + last.files, last.length) == (rank, length):
                runs[-1] = last._replace(files=last.files + 1)
            else:
                runs.append(Run(rank, 1, offset, length))
    if any(row.problem() for row in rows.values()):
        return None
    return json.dumps(
        {
            name: [
                DTYPE_NAMES[kind.dtype],
                kind.shape,
                momentum,
                [run[:2] + run[3:] for run in runs],
            ]
            for name, (kind, momentum, runs) in rows.items()
        },
        separators=(",", ":"),
    )


def read_joined(text: bytes, world_size: int) -> Placement:
    """Reads the text of `SLICES`.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: if it is not as it should be.
    """
    found: Placement = {}
    for name, (dtype, shape, momentum, runs) in json.loads(text).items():
        row = Row(_kind(name, DTYPES[dtype], shape), bool(momentum), [])
        end = 0
        for rank, count, length in runs:
            if not (0 <= rank < rank + count <= world_size and length > 0):
                raise ValueError(f"{name} lies in files that are not there")
            row.runs.append(Run(rank, count, end, length))
            end = row.runs[-1].end
        found[name] = row
    return found


def from_headers(files: Iterable[TensorFile]) -> Placement:
    """Collects the same from the headers of all files, in rank order.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: if a header is not as it should be.
    """
    found: Placement = {}
    for rank, file in enumerate(files):
        for name, place in json.loads(file.metadata["placement"]).items():
            dtype, (length,) = file.entries[WEIGHT + name].kind
            kind = _kind(name, dtype, place["shape"])
            row = found.setdefault(name, Row(kind, MOMENTUM + name in file.entries, []))
            if row.kind != kind:
                raise ValueError(f"{name} has another shape than in another file")
            if length:
                row.runs.append(Run(rank, 1, int(place["offset"]), length))
    for row in found.values():
        row.runs.sort(key=lambda run: run.offset)
    return found


def _kind(name: str, dtype: Any, shape: Iterable[Any]) -> Kind:
    kind = Kind(dtype, tuple(map(int, shape)))
    if min(kind.shape, default=0) < 0:
        raise ValueError(f"{name} has a negative side")
    return kind
