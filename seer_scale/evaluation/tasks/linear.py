"""Linear probe of frozen features, by VISSL's protocol (SEER, arXiv 2103.01988, section 4).

Each of several maps gets heads of BatchNorm and a linear layer; all heads are trained at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer_scale import distributed
from seer_scale.errors import ConfigError
from seer_scale.evaluation.datasets.labelled import LabelledData, open_labelled
from seer_scale.evaluation.feature_store import StoredFeatures, stored_features
from seer_scale.evaluation.logistic import check_logistic, predict_logistic
from seer_scale.evaluation.maps import check_maps, map_widths, probed_maps
from seer_scale.evaluation.options import LinearOptions
from seer_scale.evaluation.pictures import draw_confusion
from seer_scale.evaluation.scores import confusion, per_class, top_share
from seer_scale.evaluation.task import Context, Result
from seer_scale.evaluation.tasks.linear_heads import HeadKey, Heads
from seer_scale.evaluation.tasks.linear_training import train_heads

Options = LinearOptions


def run(context: Context, options: Options) -> Result:
    """Trains the heads and computes their top-1 and top-5 on the validation part.

    `top1` and `top5` are those of the best head, which is chosen on the validation images, as in
    the published tables; `top1_MAP` is the best top-1 on each map.

    Raises:
        ConfigError: options that contradict each other, a map that the trunk lacks, or a logistic
            regression that does not fit into memory.
        DataError: labels or images cannot be used.
    """
    if options.solver == "lbfgs" and options.augment:
        raise ConfigError(
            "solver=lbfgs needs the same features in every epoch: add augment=false, or use "
            "solver=sgd"
        )
    names = options.maps or probed_maps(context.trunk, context.trunk_name, options.benchmark)
    maps = list(dict.fromkeys(HeadKey(name, 0.0).map for name in names))
    check_maps(context.trunk, maps)
    data = open_labelled(context.data, context.labels, context.say)
    if options.solver == "lbfgs":
        largest = max(
            map_widths(
                context.trunk, options.size, maps, context.trunk_name, context.device
            ).values()
        )
        check_logistic(
            len(data.train),
            len(data.val),
            largest,
            len(data.classes),
            "use solver=sgd or maps=[avgpool]",
        )
    stored = stored_features(context, data.val, size=options.size, maps=maps)
    if options.solver == "lbfgs":
        train = stored_features(context, data.train, size=options.size, maps=maps)
        logits = {
            HeadKey(name, 0.0): predict_logistic(
                train[name].all(torch.float64),
                data.train.targets,
                stored[name].all(torch.float64),
                len(data.classes),
                options.weight_decay,
            )
            for name in maps
        }
    else:
        widths = {name: store.width for name, store in stored.items()}
        heads = train_heads(context, data, options, names, widths)
        logits = _judge(heads, stored, context.device)
    return _report(context, data, logits, options)


@torch.inference_mode()
def _judge(
    heads: Heads, stored: dict[str, StoredFeatures], device: torch.device
) -> dict[HeadKey, Tensor]:
    """Returns the validation logits [N, classes] of every head, computed block by block."""
    logits: dict[HeadKey, list[Tensor]] = {key: [] for key in heads.heads}
    for blocks in zip(*(store.blocks() for store in stored.values()), strict=True):
        vectors = {
            name: torch.from_numpy(rows).to(device)
            for name, (_, rows) in zip(stored, blocks, strict=True)
        }
        for key, values in heads.logits(vectors).items():
            logits[key].append(values.cpu())
    return {key: torch.cat(parts) for key, parts in logits.items()}


def _report(
    context: Context, data: LabelledData, logits: dict[HeadKey, Tensor], options: Options
) -> Result:
    """Reports every head, and the accuracy of the best head for each class."""
    rows: list[dict[str, Any]] = []
    for key, values in logits.items():
        rows.append(
            {
                "map": key.name,
                "base_lr": key.base_lr if options.solver == "sgd" else None,
                "top1": top_share(values, data.val.targets, 1),
                "top5": top_share(values, data.val.targets, 5),
            }
        )
    best = max(range(len(rows)), key=lambda number: float(rows[number]["top1"]))
    values = list(logits.values())[best]
    matrix = confusion(data.val.targets, values.argmax(1), len(data.classes))
    metrics = {"top1": float(rows[best]["top1"]), "top5": float(rows[best]["top5"])}
    for name in dict.fromkeys(str(row["map"]) for row in rows):
        metrics[f"top1_{name}"] = max(float(r["top1"]) for r in rows if r["map"] == name)
    pictures: tuple[Path, ...] = ()
    if distributed.is_main():
        pictures = (draw_confusion(context.folder / "confusion.png", matrix, data.classes),)
    return Result(
        metrics=metrics,
        details={
            "chosen": rows[best],
            "heads": rows,
            "images": {"train": len(data.train), "val": len(data.val)},
            "classes": len(data.classes),
            "per_class": per_class(matrix, data.classes),
        },
        pictures=pictures,
    )
