"""Few labels: 1 % or 10 % of the training part, or k images of each class.

Splits hang on the seed and the images' names alone, keep the shares of the classes and are nested:
the images of a smaller split are in every larger one of the same seed. Each is written down as a
list of names. SEER's published numbers are of fine-tuning (method=finetune); the linear method
solves logistic regression on frozen features.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from seer_scale import distributed
from seer_scale.errors import ConfigError
from seer_scale.evaluation.datasets.labelled import LabelledData, LabelledImages, open_labelled
from seer_scale.evaluation.datasets.train_list import read_names
from seer_scale.evaluation.feature_store import stored_features
from seer_scale.evaluation.scores import top_share
from seer_scale.evaluation.task import Context, Result, TaskOptions
from seer_scale.evaluation.tasks.linear import solve


class Options(TaskOptions):
    """What `lowshot` takes."""

    fractions: list[float] = Field(
        default=[0.01, 0.1], description="shares of each class's training images"
    )
    per_class: list[int] = Field(default=[], description="numbers of images of each class")
    train_list: str | None = Field(
        default=None, description="file with the names of the images to learn from, instead"
    )
    seeds: list[int] = Field(default=[0], min_length=1, description="a split for each")
    method: Literal["linear", "finetune"] = Field(
        default="linear", description="a classifier on frozen features, or fine-tuning of all"
    )
    weight_decay: float = Field(
        default=1e-2, ge=0, description="linear: of the weight, on standardised features"
    )
    size: int = Field(default=224, gt=0, description="linear: side of the centre crop in pixels")
    map: str = Field(default="avgpool", description="linear: feature map")
    finetune: dict[str, Any] = Field(
        default={}, description="finetune: options of that task, as {epochs: 70, base_lr: 0.05}"
    )


def run(context: Context, options: Options) -> Result:
    """Top-1 on the validation part for every split: its mean over seeds is `top1_SPLIT`.

    `top1` is that of the first split.
    """
    data = open_labelled(context.data, context.labels)
    wanted = splits(data, options)
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
    """Name, seed and rising positions in the training part of every split.

    Raises:
        ConfigError: no split, or a share or number that cannot be.
        DataError: a list that names no image, or images that are not there.
    """
    if options.train_list is not None:
        return [("list", 0, read_names(options.train_list, data.train))]
    for share in options.fractions:
        if not 0 < share <= 1:
            raise ConfigError(f"fractions has {share}, but each must be above 0 and at most 1")
    for count in options.per_class:
        if count < 1:
            raise ConfigError(f"per_class has {count}, but each must be 1 or more")
    if not options.fractions and not options.per_class:
        raise ConfigError("fractions and per_class are empty: name a share or a number of images")
    chosen = []
    for seed in options.seeds:
        ranked = _ranked(data.train, seed)
        chosen += [
            (f"{100 * share:g}pct", seed, _first(ranked, share)) for share in options.fractions
        ]
        chosen += [(f"{count}shot", seed, _first(ranked, count)) for count in options.per_class]
    return chosen


def write_names(path: Path, images: LabelledImages, positions: NDArray[np.int64]) -> None:
    """One name a line: the class's folder and the file, or whatever the source calls an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{_name(images, place)}\n" for place in positions.tolist()))


def _name(images: LabelledImages, place: int) -> str:
    return os.sep.join(images.source.name(int(images.indices[place])).split(os.sep)[-2:])


def _ranked(images: LabelledImages, seed: int) -> list[NDArray[np.int64]]:
    """Positions of each class's images, shuffled by a hash of seed and name."""
    keys = [
        blake2b(f"{seed} {_name(images, place)}".encode("utf-8", "surrogateescape")).digest()
        for place in range(len(images))
    ]
    order = np.array(sorted(range(len(images)), key=keys.__getitem__), dtype=np.int64)
    targets = images.targets.numpy()[order]
    return [order[targets == number] for number in np.unique(targets)]


def _first(ranked: list[NDArray[np.int64]], wanted: float) -> NDArray[np.int64]:
    """A share (a float) or number (an int) of each class, one image at least."""
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
        stored_features(context, part, size=options.size, maps=[options.map])[options.map].all()
        for part in (train, data.val)
    ]
    logits = solve(features[0], train.targets, features[1], len(data.classes), options.weight_decay)
    return {f"top{k}": top_share(logits, data.val.targets, k) for k in (1, 5)}


def _finetune(context: Context, names: Path, below: str, options: Options) -> dict[str, float]:
    """Fine-tunes a copy of the trunk, so that the next split begins at the same weights."""
    from seer_scale.evaluation.tasks import finetune

    try:
        chosen = finetune.Options(**{**options.finetune, "train_list": str(names)})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "finetune"
        raise ConfigError(f"finetune.{key}: {first['msg']}") from None
    own = replace(context, trunk=copy.deepcopy(context.trunk), folder=context.folder / below)
    result = finetune.run(own, chosen)
    return {name: result.metrics[name] for name in ("top1", "top5")}
