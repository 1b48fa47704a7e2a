"""Few labels: training on 1 % or 10 % of the training part, or on k images of each class.

Splits depend on the seed and the images' names alone, keep the shares of the classes and are
nested: a larger split of the same seed contains every smaller one. Each split is written to a file
of names. SEER's published numbers (arXiv 2103.01988) are of fine-tuning, method=finetune;
method=linear solves logistic regression on frozen features.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from seer_scale import distributed
from seer_scale.config.schema import build
from seer_scale.data.image_folder import ImageFolder
from seer_scale.errors import ConfigError
from seer_scale.evaluation.datasets.labelled import LabelledData, LabelledImages, open_labelled
from seer_scale.evaluation.datasets.train_list import read_names
from seer_scale.evaluation.feature_store import stored_features
from seer_scale.evaluation.logistic import check_logistic, predict_logistic
from seer_scale.evaluation.maps import map_widths
from seer_scale.evaluation.options import FinetuneOptions, LowshotOptions
from seer_scale.evaluation.scores import top_share
from seer_scale.evaluation.task import Context, Result

Options = LowshotOptions


def run(context: Context, options: Options) -> Result:
    """Computes top-1 and top-5 on the validation part for every split.

    `top1_SPLIT` is the mean over the seeds; `top1` is the value of the first split.

    Raises:
        ConfigError: options of the splits, or of the fine-tuning, that are not possible, or a
            logistic regression that does not fit into memory.
        DataError: labels, images or the list of names cannot be used.
    """
    data = open_labelled(context.data, context.labels, context.say)
    wanted = splits(data, options)
    if options.method == "linear":
        most = max(len(positions) for _, _, positions in wanted)
        (width,) = map_widths(
            context.trunk, options.size, [options.map], context.trunk_name, context.device
        ).values()
        check_logistic(
            most,
            len(data.val),
            width,
            len(data.classes),
            "use smaller splits, map=avgpool or method=finetune",
        )
    metrics: dict[str, list[float]] = {}
    details = []
    for name, seed, positions in wanted:
        path = context.folder / f"split_{name}_seed{seed}.txt"
        if distributed.is_main():
            write_names(path, data.train, positions)
        distributed.barrier()
        if options.method == "linear":
            found = _linear(context, data, positions, options)
        else:
            found = _finetune(context, path, f"{name}_seed{seed}", options)
        for metric, value in found.items():
            metrics.setdefault(f"{metric}_{name}", []).append(value)
        row = {"split": name, "seed": seed, "images": len(positions), "list": path.name}
        details.append({**row, **found})
        context.say(f"{name}, seed {seed}: {len(positions)} images, top-1 {found['top1']:.4f}")
    means = {name: float(np.mean(values)) for name, values in metrics.items()}
    first = wanted[0][0]
    return Result(
        metrics={"top1": means[f"top1_{first}"], "top5": means[f"top5_{first}"], **means},
        details={
            "splits": details,
            "method": options.method,
            "classes": len(data.classes),
            "images": {"train": len(data.train), "val": len(data.val)},
        },
    )


def splits(data: LabelledData, options: Options) -> list[tuple[str, int, NDArray[np.int64]]]:
    """Returns name, seed and positions in the training part, int64 rising, of every split.

    Raises:
        ConfigError: there is no split, or a share or number is out of range.
        DataError: `train_list` is empty, or names an image that does not exist.
    """
    if options.train_list is not None:
        return [("list", 0, read_names(options.train_list, data.train))]
    for share in options.fractions:
        if not 0 < share <= 1:
            raise ConfigError(
                f"fractions has {share}, but every share must be above 0 and at most 1"
            )
    for count in options.per_class:
        if count < 1:
            raise ConfigError(f"per_class has {count}, but every number must be 1 or more")
    if not options.fractions and not options.per_class:
        raise ConfigError("fractions and per_class are empty: give a share or a number of images")
    chosen = []
    for seed in options.seeds:
        ranked = _ranked(data.train, seed)
        chosen += [
            (f"{100 * share:g}pct", seed, _first(ranked, share)) for share in options.fractions
        ]
        chosen += [(f"{count}shot", seed, _first(ranked, count)) for count in options.per_class]
    return chosen


def write_names(path: Path, images: LabelledImages, positions: NDArray[np.int64]) -> None:
    """Writes one name per line: the path from the class folder on, or the name in its shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{_name(images, place)}\n" for place in positions.tolist()))


def _name(images: LabelledImages, place: int) -> str:
    source, index = images.source, int(images.indices[place])
    if isinstance(source, ImageFolder) and (below := source.name_below(index)).count(os.sep) > 1:
        return below  # `CLASS/images/0.jpg`: the folder of the file is not its class
    return os.sep.join(source.name(index).split(os.sep)[-2:])


def _ranked(images: LabelledImages, seed: int) -> list[NDArray[np.int64]]:
    """Returns the positions of each class's images, shuffled by a hash of seed and name."""
    keys = [
        blake2b(f"{seed} {_name(images, place)}".encode("utf-8", "surrogateescape")).digest()
        for place in range(len(images))
    ]
    order = np.array(sorted(range(len(images)), key=keys.__getitem__), dtype=np.int64)
    targets = images.targets.numpy()[order]
    return [order[targets == number] for number in np.unique(targets)]


def _first(ranked: list[NDArray[np.int64]], wanted: float) -> NDArray[np.int64]:
    """Returns a share (float) or a number (int) of each class's images, at least one image."""
    counts = [
        wanted if isinstance(wanted, int) else max(1, math.floor(wanted * len(places) + 0.5))
        for places in ranked
    ]
    return np.sort(
        np.concatenate([places[:count] for places, count in zip(ranked, counts, strict=True)])
    )


def _linear(
    context: Context, data: LabelledData, positions: NDArray[np.int64], options: Options
) -> dict[str, float]:
    train = data.train.subset(positions)
    features = [
        stored_features(context, part, size=options.size, maps=[options.map])[options.map].all(
            torch.float64
        )
        for part in (train, data.val)
    ]
    logits = predict_logistic(
        features[0], train.targets, features[1], len(data.classes), options.weight_decay
    )
    return {f"top{k}": top_share(logits, data.val.targets, k) for k in (1, 5)}


def _finetune(context: Context, names: Path, below: str, options: Options) -> dict[str, float]:
    """Fine-tunes a copy of the trunk, so that the next split starts from the same weights."""
    from seer_scale.evaluation.tasks import finetune

    given = {**options.finetune, "train_list": str(names)}
    chosen = build(FinetuneOptions, given, where="lowshot with method=finetune: finetune.")
    own = replace(context, trunk=copy.deepcopy(context.trunk), folder=context.folder / below)
    result = finetune.run(own, chosen)
    return {name: result.metrics[name] for name in ("top1", "top5")}
