"""Weighted k-nearest-neighbour classification of features (Wu et al., arXiv 1805.01978, 3.4).

Training images are the bank, validation images the queries. The bank is read block by block, so
that memory holds the queries of one rank and their nearest neighbours, never the whole bank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_scale import distributed
from seer_scale.evaluation.datasets.labelled import LabelledData, open_labelled
from seer_scale.evaluation.feature_store import StoredFeatures, stored_features
from seer_scale.evaluation.options import KnnOptions
from seer_scale.evaluation.pictures import draw_confusion, draw_neighbours
from seer_scale.evaluation.scores import confusion, per_class, top_share
from seer_scale.evaluation.task import Context, Result

_SHOWN = 8  # queries on the contact sheet
_SHOWN_NEIGHBOURS = 7


Options = KnnOptions


def run(context: Context, options: Options) -> Result:
    """Computes k-NN top-1 and top-5 on the validation part for every k and temperature.

    `top1` and `top5` are those of the best setting, which is chosen on the validation images, as is
    usual; `details["sweep"]` has every setting.

    Raises:
        ConfigError: the trunk lacks the map.
        DataError: labels or images cannot be used.
    """
    data = open_labelled(context.data, context.labels, context.say)
    bank = stored_features(context, data.train, size=options.size, maps=[options.map])[options.map]
    queries = stored_features(context, data.val, size=options.size, maps=[options.map])[options.map]
    largest = min(max(options.k), len(data.train))
    cosine, nearest = _nearest_of_all(bank, queries, largest, context.device)  # [M, k], all ranks
    voters = data.train.targets[nearest]  # [M, k]
    sweep = []
    best: tuple[float, Tensor] = (-1.0, torch.empty(0))
    for temperature in options.temperature:
        for k in options.k:
            votes = vote(cosine[:, :k], voters[:, :k], len(data.classes), temperature)
            top1 = top_share(votes, data.val.targets, 1)
            top5 = top_share(votes, data.val.targets, 5)
            sweep.append({"k": k, "temperature": temperature, "top1": top1, "top5": top5})
            if top1 > best[0]:
                best = (top1, votes)
    chosen = next(row for row in sweep if row["top1"] == best[0])
    if len(sweep) > 1:
        context.say(
            f"k = {chosen['k']} and temperature {chosen['temperature']:g} are the best of "
            f"{len(sweep)} settings on the validation images themselves, as is usual; "
            "to choose beforehand, give one of each, such as k=[20] temperature=[0.07]"
        )
    predictions = best[1].argmax(1)
    matrix = confusion(data.val.targets, predictions, len(data.classes))
    pictures = (
        _pictures(context, data, matrix, predictions, nearest) if distributed.is_main() else ()
    )
    return Result(
        metrics={"top1": chosen["top1"], "top5": chosen["top5"]},
        details={
            "chosen": {"k": chosen["k"], "temperature": chosen["temperature"]},
            "sweep": sweep,
            "images": {"train": len(data.train), "val": len(data.val)},
            "classes": len(data.classes),
            "per_class": per_class(matrix, data.classes),
            "features": bank.width,
        },
        pictures=pictures,
    )


@torch.inference_mode()
def nearest(
    bank: Iterable[tuple[int, Tensor]], queries: Tensor, k: int, *, batch: int = 256
) -> tuple[Tensor, Tensor]:
    """Finds the k nearest rows, by cosine, of a bank that arrives in blocks.

    Args:
        bank: number of the first row, and rows [<= block, C], of every block.
        queries: features [M, C].
        k: number of neighbours, at most the number of rows in the bank.
        batch: queries that are compared with a block at once.

    Returns:
        Cosines [M, k], falling, and numbers of rows int64 [M, k].
    """
    unit = F.normalize(queries, dim=1)
    cosines = unit.new_full((len(unit), k), -torch.inf)
    numbers = torch.zeros(len(unit), k, dtype=torch.int64, device=unit.device)
    for first, rows in bank:
        columns = F.normalize(rows.to(unit.device), dim=1).T
        for start in range(0, len(unit), batch):
            part = slice(start, start + batch)
            similar = unit[part] @ columns  # [batch, block]
            best, which = similar.topk(min(k, similar.shape[1]), dim=1)
            both = torch.cat([cosines[part], best], dim=1)
            candidates = torch.cat([numbers[part], which + first], dim=1)
            cosines[part], kept = both.topk(k, dim=1)
            numbers[part] = candidates.gather(1, kept)
    return cosines, numbers


def vote(cosines: Tensor, classes: Tensor, count: int, temperature: float) -> Tensor:
    """Returns the votes float64 [M, count] for each class.

    Args:
        cosines: cosines of the neighbours [M, k], falling.
        classes: classes of the neighbours, int64 [M, k].
        count: number of classes.
        temperature: a neighbour's vote weighs exp(cosine / temperature).
    """
    # Relative to the nearest neighbour: only ratios count, and exp would overflow.
    weights = ((cosines - cosines[:, :1]).double() / temperature).exp()
    votes = torch.zeros(len(cosines), count, dtype=torch.float64, device=cosines.device)
    return votes.scatter_add_(1, classes, weights)


@torch.inference_mode()
def knn_top1(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Returns the share of queries whose class wins the vote of their k nearest bank features.

    Args:
        bank: features [N, C]; neighbours are nearest by cosine.
        bank_labels: classes, int64 [N].
        queries: features [M, C].
        query_labels: classes, int64 [M].
        k: neighbours that vote for each query; more than N means N.
        temperature: a neighbour's vote weighs exp(cosine / temperature).
    """
    cosines, numbers = nearest([(0, bank)], queries, min(k, len(bank)), batch=len(queries))
    count = int(torch.cat([bank_labels, query_labels]).max()) + 1
    votes = vote(cosines, bank_labels[numbers], count, temperature)
    return float((votes.argmax(1) == query_labels).double().mean())


def _nearest_of_all(
    bank: StoredFeatures, queries: StoredFeatures, k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns cosines and rows [M, k] of all queries; each rank computes its own blocks of them."""
    rank, world = distributed.rank(), distributed.world_size()
    blocks = [(first, torch.from_numpy(rows)) for first, rows in queries.blocks(rank, world)]
    found: list[tuple[int, Tensor, Tensor]] = []
    if blocks:
        rows = torch.cat([rows for _, rows in blocks]).to(device)
        entries = ((first, torch.from_numpy(part)) for first, part in bank.blocks())
        cosines, numbers = nearest(entries, rows, k)
        ends = torch.tensor([len(part) for _, part in blocks]).cumsum(0).tolist()
        for (first, part), end in zip(blocks, ends, strict=True):
            own = slice(end - len(part), end)
            found.append((first, cosines[own].cpu(), numbers[own].cpu()))
    everyone = sorted(distributed.gather_lists(found), key=lambda entry: entry[0])
    return torch.cat([entry[1] for entry in everyone]), torch.cat([entry[2] for entry in everyone])


def _pictures(
    context: Context, data: LabelledData, matrix: Tensor, predictions: Tensor, nearest: Tensor
) -> tuple[Any, ...]:
    """Draws the confusion matrix, and a sheet of queries spread evenly over the validation part."""
    confusion_file = draw_confusion(context.folder / "confusion.png", matrix, data.classes)
    chosen = torch.linspace(0, len(data.val) - 1, min(_SHOWN, len(data.val))).round().long()
    rows = [
        (
            (int(data.val.indices[query]), int(data.val.targets[query])),
            [
                (int(data.train.indices[place]), int(data.train.targets[place]))
                for place in nearest[query, :_SHOWN_NEIGHBOURS].tolist()
            ],
            int(predictions[query]),
        )
        for query in chosen.tolist()
    ]
    sheet = draw_neighbours(context.folder / "neighbours.png", data, rows)
    return confusion_file, sheet
