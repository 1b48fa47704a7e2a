"""Training of the heads of the task `linear`, the same under any number of processes.

Every rank computes its share of a batch's features, all ranks get all of them, and all take the
same step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from seer_scale import distributed
from seer_scale.data.order import order_key, permute_all
from seer_scale.errors import ConfigError
from seer_scale.evaluation.datasets.labelled import LabelledData
from seer_scale.evaluation.feature_store import images_digest, stored_features, weights_digest
from seer_scale.evaluation.labelled_crops import TrainCrop, crop_batches
from seer_scale.evaluation.maps import cells, pooled_maps
from seer_scale.evaluation.options import LinearOptions
from seer_scale.evaluation.task import Context
from seer_scale.evaluation.tasks.linear_heads import HeadKey, Heads, build_head

_CHUNK = 32  # training images that go through the trunk at once, under any number of ranks

Vectors = dict[str, Tensor]


def train_heads(
    context: Context,
    data: LabelledData,
    options: LinearOptions,
    names: Sequence[str],
    widths: Mapping[str, int],
) -> Heads:
    """Trains one head for each name and learning rate; resumes a killed evaluation.

    Args:
        context: trunk, folder and device.
        data: images to train on.
        options: options of the task.
        names: maps to probe; `_plain` behind a name is a head without BatchNorm.
        widths: numbers in the vector of each map.

    Raises:
        ConfigError: there are fewer than two training images.
        DataError: an image cannot be read or decoded.
    """
    batch = min(options.batch, len(data.train))
    if batch < 2:
        raise ConfigError(
            "the training part has 1 image, but a linear probe needs two or more, because "
            "BatchNorm does: add images"
        )
    heads = Heads(
        {
            key: build_head(
                key,
                widths[key.map],
                cells(context.trunk_name, key.map),
                len(data.classes),
                options.seed,
            ).to(context.device)
            for name in names
            for rate in options.base_lr
            for key in [HeadKey(name, rate)]
        },
        lr_scale=batch / 256,
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
    )
    path = _state_path(context, data, options, names)
    first = heads.load(path)
    if first:
        context.say(f"resuming after epoch {first} of {options.epochs}")
    kept = None
    if not options.augment:
        train = stored_features(context, data.train, size=options.size, maps=list(widths))
        kept = {name: train[name].all() for name in widths}
    for epoch in range(first, options.epochs):
        factor = options.lr_gamma ** sum(epoch >= step for step in options.lr_steps)
        order = permute_all(len(data.train), order_key(options.seed, "linear", epoch))
        # The incomplete batch at the end is left out; the order of the next epoch is another.
        steps = order[: len(order) // batch * batch].reshape(-1, batch)
        if kept is None:
            vectors = _computed(context, data, options, steps, epoch, widths)
        else:
            vectors = _looked_up(kept, steps, context.device)
        losses = [
            heads.step(values, data.train.targets[positions].to(context.device), factor)
            for positions, values in zip(steps, vectors, strict=True)
        ]
        context.say(f"epoch {epoch + 1}/{options.epochs}: loss {sum(losses) / len(losses):.4f}")
        if distributed.is_main():
            heads.save(path, epoch + 1)
    distributed.barrier()
    return heads


def _looked_up(kept: Vectors, steps: NDArray[np.int64], device: torch.device) -> Iterator[Vectors]:
    """Yields the vectors of every step from features that were computed once."""
    for positions in steps:
        yield {name: values[positions].to(device) for name, values in kept.items()}


def _computed(
    context: Context,
    data: LabelledData,
    options: LinearOptions,
    steps: NDArray[np.int64],
    epoch: int,
    widths: Mapping[str, int],
) -> Iterator[Vectors]:
    """Yields the vectors of random crops for every step, on every rank.

    Args:
        context: trunk and device.
        data: images to train on.
        options: options of the task.
        steps: positions in the training part, int64 [steps, batch].
        epoch: number of the epoch, from which the crops follow.
        widths: numbers in the vector of each map.
    """
    batch = steps.shape[1]
    # Ranks take chunks in turn; a chunk holds the same images under any number of ranks.
    starts = range(distributed.rank() * _CHUNK, batch, distributed.world_size() * _CHUNK)
    first = epoch * len(data.train)
    chunks = (
        [
            (int(steps[number, place]), first + number * batch + place)
            for place in range(start, min(start + _CHUNK, batch))
        ]
        for number in range(len(steps))
        for start in starts
    )
    crops = crop_batches(data.train, chunks, TrainCrop(options.size, options.seed))
    for _ in steps:
        own: list[Vectors] = []
        for _ in starts:
            images = next(crops)[0].to(context.device)
            with torch.no_grad():
                own.append(pooled_maps(context.trunk, images, list(widths), context.trunk_name))
        yield {
            name: gather_chunks([part[name] for part in own], batch, width, context.device)
            for name, width in widths.items()
        }


def gather_chunks(own: Sequence[Tensor], rows: int, width: int, device: torch.device) -> Tensor:
    """Returns the rows [rows, width] of all ranks, which took chunks of `_CHUNK` rows in turn."""
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


def _state_path(
    context: Context, data: LabelledData, options: LinearOptions, names: Sequence[str]
) -> Path:
    """Returns the path of the heads in training; it differs for another model, set or option."""
    digest = xxhash.xxh3_64()
    for part in (
        weights_digest(context.trunk),
        images_digest(data.train),
        options.model_dump_json(),
        repr((list(names), data.classes)),
    ):
        digest.update(part.encode())
    digest.update(data.train.targets.numpy().tobytes())
    return context.folder / f"heads-{digest.hexdigest()}.safetensors"
