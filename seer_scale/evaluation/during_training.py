"""kNN of a checkpoint's trunk while pretraining goes on, by all ranks together.

The trunk that is judged is the one in the checkpoint just written: whole whatever the strategy,
with running statistics averaged over the ranks, and exactly what is registered. A forward pass
through the sharded model would need every strategy's own way of gathering weights in eval mode.
Nothing here draws a random number, so the training goes on as if nothing had been.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.checkpoint import CheckpointReader
from seer_scale.data.contact_sheet import spread
from seer_scale.evaluation.datasets.labelled import LabelledImages, open_labelled
from seer_scale.evaluation.features import prepare
from seer_scale.evaluation.prototype_sheet import write_prototype_sheet
from seer_scale.evaluation.reading import decoded
from seer_scale.evaluation.tasks.knn import knn_top1
from seer_scale.serving import load_trunk
from seer_scale.tracking.records import EVALUATED

SHEETS = "eval"  # folder of a run's prototype sheets
_QUERIES = 1024  # compared with the bank at once


class DuringTraining:
    """Judges checkpoints on one labelled set; every rank has one and calls it alike.

    Args:
        data: as `open_labelled` takes it.
        size: pixels of the middle crop.
        k: neighbours that vote.
        temperature: of their votes.
        images: most that are used of each part, evenly spaced.
        batch: images per rank and forward pass.
        prototypes: rows of the sheet; 0 for none.
        device: of this rank.

    Raises:
        DataError: if the labelled set is not as it should be.
    """

    def __init__(
        self,
        data: str,
        *,
        size: int,
        k: int,
        temperature: float,
        images: int,
        batch: int,
        prototypes: int,
        device: torch.device,
    ) -> None:
        opened = open_labelled(data)
        self._bank, self._queries = (
            part.subset(spread(len(part), images)) for part in (opened.train, opened.val)
        )
        self._size, self._k, self._temperature = size, k, temperature
        self._batch, self._prototypes, self._device = batch, prototypes, device

    def judge(self, checkpoint: Path) -> dict[str, float]:
        """`eval/knn_top1` of a checkpoint; the same on every rank.

        Rank 0 also draws the prototypes' nearest images, into `eval/` beside the checkpoints.
        """
        trunk = load_trunk(checkpoint / "trunk").to(self._device)
        bank = extract_shared(trunk, self._bank, self._size, self._batch)
        queries = extract_shared(trunk, self._queries, self._size, self._batch)
        del trunk
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        right, rank, world = 0, distributed.rank(), distributed.world_size()
        mine = torch.arange(rank, len(queries), world)
        for start in range(0, len(mine), _QUERIES):
            part = mine[start : start + _QUERIES]
            share = knn_top1(
                bank,
                self._bank.targets,
                queries[part],
                self._queries.targets[part],
                k=self._k,
                temperature=self._temperature,
            )
            right += round(share * len(part))
        total = distributed.all_reduce(torch.tensor(right, device=self._device))
        if self._prototypes and distributed.is_main():
            path = sheet_of(checkpoint)
            path.parent.mkdir(exist_ok=True)
            reader = CheckpointReader(checkpoint)
            write_prototype_sheet(path, reader, bank, self._bank, rows=self._prototypes)
        return {EVALUATED: int(total) / len(queries)}


def sheet_of(checkpoint: Path) -> Path:
    """Where the sheet of a run's checkpoint is drawn."""
    return checkpoint.parents[1] / SHEETS / f"prototypes_{checkpoint.name}.png"


@torch.inference_mode()
def extract_shared(trunk: nn.Module, images: LabelledImages, size: int, batch: int) -> Tensor:
    """Features float32 [N, C] of all images on every rank, each computed by one of them.

    Raises:
        DataError: if an image cannot be used; names it.
    """
    device = next(trunk.parameters()).device
    world, rank = distributed.world_size(), distributed.rank()
    share = -(-len(images) // world)
    # The last round wraps around: every rank has as many, and what is twice is cut off below.
    mine = (np.arange(share) * world + rank) % len(images)
    parts = []
    for part in np.array_split(images.indices[mine], -(-share // batch)):
        pixels = [prepare(decoded(images.source, int(index)), size) for index in part]
        parts.append(trunk(torch.stack(pixels).to(device)).float())
    gathered = distributed.all_gather(torch.cat(parts)).cpu()  # [world * share, C], rank by rank
    in_order = gathered.view(world, share, -1).transpose(0, 1).reshape(world * share, -1)
    return in_order[: len(images)]
