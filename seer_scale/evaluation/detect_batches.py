"""Training batches of a detector: images and targets, in an order that follows from the seed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor
from torchvision.transforms import functional as V

from seer_scale import distributed
from seer_scale.data.order import order_key, permute_all, sample_rng
from seer_scale.evaluation.datasets.coco import CocoPart, Picture, corners
from seer_scale.evaluation.labelled_crops import make_ahead

Sample = tuple[Tensor, dict[str, Tensor]]
FLIP_PROBABILITY = 0.5


def training_batches(
    part: CocoPart, *, batch: int, first: int, seed: int, masks: bool, workers: int
) -> Iterator[list[Sample]]:
    """Yields this rank's share of every global batch from number `first` on, without end.

    Args:
        part: the training part; every epoch has its own order of the pictures with objects.
        batch: images over all ranks; a multiple of the number of ranks.
        first: number of batches that are already done.
        seed: seed of the order and the flips.
        masks: whether the targets contain masks.
        workers: threads that decode images.

    Yields:
        Images float32 [3, H, W] in 0 to 1, and their targets: `boxes` float32 [N, 4] as left, top,
        right, bottom in pixels, `labels` int64 [N] and, if wanted, `masks` uint8 [N, H, W].
    """
    pictures = part.with_objects
    share = batch // distributed.world_size()
    orders: dict[int, list[int]] = {}

    def which(position: int) -> int:
        epoch, place = divmod(position, len(pictures))
        if epoch not in orders:
            orders.pop(min(orders, default=0), None) if len(orders) > 1 else None
            key = order_key(seed, "detection", epoch)
            orders[epoch] = permute_all(len(pictures), key).tolist()
        return orders[epoch][place]

    start = distributed.rank() * share
    batches = (
        [
            (pictures[which(p)], p)
            for p in range(number * batch + start, number * batch + start + share)
        ]
        for number in count(first)
    )
    yield from make_ahead(batches, lambda item: _sample(part, *item, seed, masks), workers=workers)


def _sample(part: CocoPart, picture: Picture, position: int, seed: int, masks: bool) -> Sample:
    image = V.to_tensor(picture.read())
    objects = picture.singles
    target = {
        "boxes": torch.tensor([corners(each) for each in objects]),
        "labels": torch.tensor([part.labels[each["category_id"]] for each in objects]),
    }
    if masks:
        target["masks"] = part.masks(picture, objects)
    if sample_rng(seed, position).random() < FLIP_PROBABILITY:
        image = image.flip(-1)
        left, top, right, bottom = target["boxes"].unbind(1)
        target["boxes"] = torch.stack(
            [picture.width - right, top, picture.width - left, bottom], dim=1
        )
        if masks:
            target["masks"] = target["masks"].flip(-1)
    return image, target
