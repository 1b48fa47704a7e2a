"""Images and targets that a detector is trained on, in an order that follows from the seed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torchvision.transforms import functional as V

from seer_scale import distributed
from seer_scale.data.order import order_key, permute_all, sample_rng
from seer_scale.evaluation.datasets.coco import Picture, binary_masks

Sample = tuple[Tensor, dict[str, Tensor]]
FLIP_PROBABILITY = 0.5
_AHEAD = 3  # batches that are made ahead


def training_batches(
    pictures: Sequence[Picture], *, batch: int, first: int, seed: int, masks: bool, workers: int
) -> Iterator[list[Sample]]:
    """This rank's part of every global batch from number `first` on, without end.

    Args:
        pictures: those with objects; every epoch has its own order of them.
        batch: images over all ranks, which divide it.
        first: batches that are done.
        seed: of order and flips.
        masks: whether targets have masks.
        workers: threads that decode.

    Yields:
        Images float32 [3, H, W] of 0 to 1, and targets: `boxes` [N, 4], `labels` [N] and, if
        asked for, `masks` uint8 [N, H, W].
    """
    share = batch // distributed.world_size()
    waiting: deque[list[Future[Sample]]] = deque()
    orders: dict[int, list[int]] = {}

    def which(position: int) -> int:
        epoch, place = divmod(position, len(pictures))
        if epoch not in orders:
            orders.pop(min(orders, default=0), None) if len(orders) > 1 else None
            key = order_key(seed, "detection", epoch)
            orders[epoch] = permute_all(len(pictures), key).tolist()
        return orders[epoch][place]

    start = first * batch + distributed.rank() * share
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while len(waiting) < _AHEAD:
                    positions = range(start, start + share)
                    waiting.append(
                        [
                            pool.submit(_sample, pictures[which(p)], p, seed, masks)
                            for p in positions
                        ]
                    )
                    start += batch
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _sample(picture: Picture, position: int, seed: int, masks: bool) -> Sample:
    image = V.to_tensor(picture.read())
    objects = picture.singles
    target = {
        "boxes": torch.tensor([instance.box for instance in objects]),
        "labels": torch.tensor([instance.label for instance in objects]),
    }
    if masks:
        target["masks"] = binary_masks(picture, objects)
    if sample_rng(seed, position).random() < FLIP_PROBABILITY:
        image = image.flip(-1)
        left, top, right, bottom = target["boxes"].unbind(1)
        target["boxes"] = torch.stack(
            [picture.width - right, top, picture.width - left, bottom], dim=1
        )
        if masks:
            target["masks"] = target["masks"].flip(-1)
    return image, target
