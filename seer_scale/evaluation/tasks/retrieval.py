"""Image retrieval by cosine: originals look for their copies (CopyDays), or images for their class.

Each rank takes its share of the queries and sorts the whole database for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from seer_scale import distributed
from seer_scale.data import Source, open_source
from seer_scale.errors import DataError
from seer_scale.evaluation.datasets.labelled import LabelledImages, open_labelled
from seer_scale.evaluation.feature_store import stored_features
from seer_scale.evaluation.options import RetrievalOptions
from seer_scale.evaluation.scores import average_precision, average_precision_trapezoid
from seer_scale.evaluation.task import Context, Result

Options = RetrievalOptions

ORIGINAL, DISTRACTORS = "original", "distractors"
_BATCH = 64  # queries that are compared with the database at once
_PREFIX = 4  # CopyDays: 200000.jpg is an original, 200001.jpg to 200099.jpg are its copies
_NONE = -1  # group of every distractor


@dataclass(frozen=True)
class RetrievalData:
    """Queries and database; an item is relevant to the queries of its own group.

    Attributes:
        queries: parts that together hold Q queries.
        database: parts that together hold D items.
        query_groups: int64 [Q], the group of each query.
        database_groups: int64 [D], the group of each item; distractors have -1.
    """

    queries: list[LabelledImages]
    database: list[LabelledImages]
    query_groups: NDArray[np.int64]
    database_groups: NDArray[np.int64]


def run(context: Context, options: Options) -> Result:
    """Computes the mean average precision over queries.

    `map` is the area under the precision-recall steps; `map_trapezoid` is the value that the
    retrieval sets' own programs compute, see `average_precision_trapezoid`.

    Raises:
        ConfigError: the trunk lacks the map.
        DataError: the images cannot be used, see `open_retrieval`.
    """
    data = open_retrieval(context.data, options, context.labels, context.say)
    queries, database = (
        torch.cat(
            [
                stored_features(context, part, size=options.size, maps=[options.map])[
                    options.map
                ].all()
                for part in parts
            ]
        )
        for parts in (data.queries, data.database)
    )
    rows = score(queries, database, data, context.device)
    steps, trapezoids, first = (np.array(column) for column in zip(*rows, strict=True))
    return Result(
        metrics={
            "map": float(steps.mean()),
            "map_trapezoid": float(trapezoids.mean()),
            "precision_at_1": float(first.mean()),
        },
        details={
            "queries": len(queries),
            "database": len(database),
            "distractors": int((data.database_groups == _NONE).sum()),
            "features": queries.shape[1],
        },
    )


def score(
    queries: Tensor, database: Tensor, data: RetrievalData, device: torch.device
) -> list[tuple[float, float, float]]:
    """Returns both average precisions of each query, and whether its nearest item is relevant.

    Args:
        queries: features [Q, C].
        database: features [D, C].
        data: groups of both.
        device: device that computes the cosines.
    """
    columns = F.normalize(database.to(device), dim=1).T
    starts = range(0, len(queries), _BATCH)
    found: list[tuple[int, float, float, float]] = []
    for start in starts[distributed.rank() :: distributed.world_size()]:
        unit = F.normalize(queries[start : start + _BATCH].to(device), dim=1)
        for place, similar in enumerate((unit @ columns).cpu().numpy(), start=start):
            relevant = data.database_groups == data.query_groups[place]
            found.append(
                (
                    place,
                    average_precision(relevant, similar),
                    average_precision_trapezoid(relevant, similar),
                    float(relevant[similar.argmax()]),
                )
            )
    return [row[1:] for row in sorted(distributed.gather_lists(found))]


def open_retrieval(
    path: str,
    options: Options,
    labels: str | None = None,
    say: Callable[[str], None] | None = None,
) -> RetrievalData:
    """Opens queries and database below a path.

    CopyDays has a folder `original`, a folder of copies and optionally a folder `distractors`. In
    any other labelled set, validation images look for training images of their class.

    Raises:
        DataError: a folder is missing, an original has no copy, or the labelled set cannot be used.
    """
    copydays = options.protocol == "copydays" or (
        options.protocol == "auto" and (Path(path) / ORIGINAL).is_dir()
    )
    if not copydays:
        labelled = open_labelled(path, labels, say)
        return RetrievalData(
            [labelled.val],
            [labelled.train],
            labelled.val.targets.numpy(),
            labelled.train.targets.numpy(),
        )
    sources: dict[str, Source] = {}
    for name in (ORIGINAL, options.copies):
        if not (Path(path) / name).is_dir():
            raise DataError(f"--data {path} has no folder {name}: CopyDays needs this folder")
        sources[name] = open_source(Path(path) / name)
    groups: dict[str, int] = {}
    asked = _groups(sources[ORIGINAL], groups)
    known = len(groups)
    offered = _groups(sources[options.copies], groups)
    if missing := set(asked.tolist()) - set(offered.tolist()):
        name = next(key for key, number in groups.items() if number in missing)
        raise DataError(
            f"{len(missing)} of {known} originals have no copy in {options.copies}, such as the "
            f"one whose name begins with {name}: add its copies or remove it"
        )
    database = [LabelledImages.whole(sources[options.copies])]
    if (Path(path) / DISTRACTORS).is_dir():
        database.append(LabelledImages.whole(open_source(Path(path) / DISTRACTORS)))
        offered = np.append(offered, np.full(len(database[1]), _NONE, dtype=np.int64))
    return RetrievalData([LabelledImages.whole(sources[ORIGINAL])], database, asked, offered)


def _groups(source: Source, groups: dict[str, int]) -> NDArray[np.int64]:
    """Returns the number of the original of each image by its name; adds new ones to `groups`."""
    found = []
    for index in range(len(source)):
        stem = Path(source.name(index)).stem
        copydays = stem.isdecimal() and len(stem) == _PREFIX + 2
        key = stem[:_PREFIX] if copydays else stem.partition("_")[0]
        found.append(groups.setdefault(key, len(groups)))
    return np.array(found, dtype=np.int64)
