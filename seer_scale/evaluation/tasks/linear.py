"""Linear probe of frozen features, by VISSL's protocol (SEER, arXiv 2103.01988, section 4).

Heads on several maps, each with BatchNorm, are trained at once on random crops. Every rank computes
its share of a batch's features, all get all of them, and all take the same step: the result does
not hang on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from seer_scale import distributed
from seer_scale.data.order import order_key, permute_all
from seer_scale.errors import ConfigError
from seer_scale.evaluation.datasets.labelled import LabelledData, open_labelled
from seer_scale.evaluation.feature_store import (
    StoredFeatures,
    images_digest,
    stored_features,
    weights_digest,
)
from seer_scale.evaluation.logistic import fit_logistic, standardise
from seer_scale.evaluation.maps import cells, check_maps, pooled_maps, probed_maps
from seer_scale.evaluation.pictures import draw_confusion
from seer_scale.evaluation.reading import batches, training_crop
from seer_scale.evaluation.scores import confusion, per_class, top_share
from seer_scale.evaluation.task import Context, Result, TaskOptions
from seer_scale.evaluation.tasks.linear_heads import HeadKey, Heads, build_head

_CHUNK = 32  # images that go through the trunk at once while training, on any number of ranks

Vectors = dict[str, Tensor]


class Options(TaskOptions):
    """What `linear` takes; the defaults are those of ImageNet."""

    maps: list[str] | None = Field(
        default=None, description="feature maps with a head each; the last two stages and avgpool"
    )
    base_lr: list[float] = Field(
        default=[0.01],
        min_length=1,
        description="learning rates per 256 images, with a head each on every map",
    )
    epochs: int = Field(default=28, gt=0, description="passes over the training images")
    lr_steps: list[int] = Field(
        default=[8, 16, 24], description="epochs after which the learning rate falls"
    )
    lr_gamma: float = Field(default=0.1, gt=0, le=1, description="by this factor")
    weight_decay: float = Field(default=5e-4, ge=0, description="of the linear layer")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD")
    nesterov: bool = Field(default=True, description="Nesterov's momentum")
    batch: int = Field(default=256, gt=1, description="images a step, over all ranks")
    size: int = Field(default=224, gt=0, description="side of the crops in pixels")
    augment: bool = Field(
        default=True,
        description="random resized crops and flips; false computes features once and keeps them",
    )
    solver: Literal["sgd", "lbfgs"] = Field(
        default="sgd",
        description="lbfgs solves logistic regression on standardised features exactly; it needs "
        "augment=false",
    )
    seed: int = Field(default=0, ge=0, description="of order, crops and initial values")


def run(context: Context, options: Options) -> Result:
    """Top-1 and top-5 of the heads on the validation part.

    `top1` and `top5` are the best head's, which is chosen on the validation images, as the
    published tables do; `top1_MAP` is the best on each map.
    """
    if options.solver == "lbfgs" and options.augment:
        raise ConfigError(
            "solver=lbfgs needs features that stay as they are: add augment=false, or use "
            "solver=sgd"
        )
    maps = options.maps or probed_maps(context.trunk)
    check_maps(context.trunk, maps)
    data = open_labelled(context.data, context.labels)
    stored = stored_features(context, data.val, size=options.size, maps=maps)
    if options.solver == "lbfgs":
        train = stored_features(context, data.train, size=options.size, maps=maps)
        logits = {
            HeadKey(name, 0.0): solve(
                train[name].all(),
                data.train.targets,
                stored[name].all(),
                len(data.classes),
                options.weight_decay,
            )
            for name in maps
        }
    else:
        heads = _train(context, data, options, maps, stored)
        logits = _judge(heads, stored, context.device)
    return _report(context, data, logits, options)


def solve(train: Tensor, targets: Tensor, val: Tensor, classes: int, weight_decay: float) -> Tensor:
    """Validation logits of logistic regression on standardised features.

    Args:
        train: features [N, C].
        targets: [N].
        val: features [M, C].
        classes: how many.
        weight_decay: see `fit_logistic`.
    """
    ours, theirs = standardise(train, val)
    weight, bias = fit_logistic(ours, targets, classes, weight_decay=weight_decay)
    return theirs @ weight.T + bias


def _train(
    context: Context,
    data: LabelledData,
    options: Options,
    maps: Sequence[str],
    stored: dict[str, StoredFeatures],
) -> Heads:
    """Trains all heads, from where a killed evaluation stopped."""
    batch = min(options.batch, len(data.train))
    if batch < 2:
        raise ConfigError("a linear probe needs two training images or more: BatchNorm does")
    heads = Heads(
        {
            key: build_head(
                key,
                stored[name].width,
                cells(context.trunk_name, name),
                len(data.classes),
                options.seed,
            ).to(context.device)
            for name in maps
            for rate in options.base_lr
            for key in [HeadKey(name, rate)]
        },
        lr_scale=batch / 256,
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
    )
    path = _state_path(context, data, options, maps)
    first = int(heads.load(path).get("epoch", 0))
    if first:
        context.say(f"going on after epoch {first} of {options.epochs}")
    widths = {name: store.width for name, store in stored.items()}
    kept = None
    if not options.augment:
        train = stored_features(context, data.train, size=options.size, maps=maps)
        kept = {name: train[name].all() for name in maps}
    for epoch in range(first, options.epochs):
        factor = options.lr_gamma ** sum(epoch >= step for step in options.lr_steps)
        order = permute_all(len(data.train), order_key(options.seed, "linear", epoch))
        losses = []
        steps = _epoch(context, data, options, maps, order, batch, epoch, kept, widths)
        for positions, vectors in steps:
            targets = data.train.targets[positions].to(context.device)
            losses.append(heads.step(vectors, targets, factor))
        context.say(f"epoch {epoch + 1}/{options.epochs}: loss {sum(losses) / len(losses):.4f}")
        if distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            heads.save(path, {"epoch": epoch + 1})
    distributed.barrier()
    return heads


def _epoch(
    context: Context,
    data: LabelledData,
    options: Options,
    maps: Sequence[str],
    order: NDArray[np.int64],
    batch: int,
    epoch: int,
    kept: Vectors | None,
    widths: dict[str, int],
) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
    """Whole batches of an epoch: positions in the training part, and vectors of every map.

    What is left over at its end waits for another epoch, whose order is another.
    """
    steps = [order[start : start + batch] for start in range(0, len(order) - batch + 1, batch)]
    if kept is not None:
        for positions in steps:
            yield positions, {name: kept[name][positions].to(context.device) for name in maps}
        return
    rank, world = distributed.rank(), distributed.world_size()
    # Chunk by chunk in turn to the ranks, so that each goes through the trunk in the same company.
    mine = [
        range(step * batch + start, min(step * batch + start + _CHUNK, (step + 1) * batch))
        for step in range(len(steps))
        for start in range(rank * _CHUNK, batch, world * _CHUNK)
    ]

    def crop(place: int) -> Any:
        index = int(data.train.indices[order[place]])
        stream = epoch * len(order) + place
        return training_crop(data.train.source, index, options.size, options.seed, stream)

    read = batches(mine, crop)
    for positions in steps:
        own: list[Vectors] = []
        for _ in range(rank * _CHUNK, batch, world * _CHUNK):
            _, images = next(read)
            with torch.no_grad():
                own.append(
                    pooled_maps(
                        context.trunk, images.to(context.device), list(maps), context.trunk_name
                    )
                )
        yield (
            positions,
            {
                name: gather_chunks(
                    [part[name] for part in own], batch, widths[name], context.device
                )
                for name in maps
            },
        )


def gather_chunks(own: Sequence[Tensor], rows: int, width: int, device: torch.device) -> Tensor:
    """Rows [rows, width] of all ranks, whose chunks of `_CHUNK` rows were dealt out in turn."""
    world = distributed.world_size()
    if world == 1:
        return torch.cat(list(own))
    chunks = -(-rows // _CHUNK)
    turns = -(-chunks // world)
    padded = torch.zeros(turns, _CHUNK, width, device=device)
    for turn, part in enumerate(own):
        padded[turn, : len(part)] = part
    everyone = distributed.all_gather(padded).view(world, turns, _CHUNK, width)
    return everyone.transpose(0, 1).reshape(-1, width)[:rows].contiguous()


@torch.inference_mode()
def _judge(
    heads: Heads, stored: dict[str, StoredFeatures], device: torch.device
) -> dict[HeadKey, Tensor]:
    """Validation logits of every head, block by block."""
    logits: dict[HeadKey, list[Tensor]] = {key: [] for key in heads.heads}
    for blocks in zip(*(store.blocks() for store in stored.values()), strict=True):
        vectors = {
            name: torch.from_numpy(rows).to(device)
            for name, (_, rows) in zip(stored, blocks, strict=True)
        }
        for key, values in heads.logits(vectors).items():
            logits[key].append(values.cpu())
    return {key: torch.cat(parts) for key, parts in logits.items()}


def _state_path(
    context: Context, data: LabelledData, options: Options, maps: Sequence[str]
) -> Path:
    """Of the heads under way; another model, set or option has another."""
    digest = xxhash.xxh3_64()
    for part in (
        weights_digest(context.trunk),
        images_digest(data.train),
        options.model_dump_json(),
        repr((list(maps), data.classes)),
    ):
        digest.update(part.encode())
    digest.update(data.train.targets.numpy().tobytes())
    return context.folder / f"heads-{digest.hexdigest()}.safetensors"


def _report(
    context: Context, data: LabelledData, logits: dict[HeadKey, Tensor], options: Options
) -> Result:
    """The numbers of every head, and what the best one gets right."""
    rows: list[dict[str, Any]] = []
    for key, values in logits.items():
        rows.append(
            {
                "map": key.map,
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
