"""k-NN accuracy of a checkpoint's trunk during pretraining, computed by all ranks together.

The judged trunk is read from the checkpoint just written. That trunk is whole under every sharding
strategy, has running statistics averaged over the ranks, and is exactly what is registered; a
forward pass through the sharded model would need each strategy's own way to gather weights in eval
mode. Of a large trunk a rank holds one layer at a time (see `layerwise`). Nothing here draws a
random number, so that the training is unaffected.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.checkpoint import CheckpointReader
from seer_scale.data.decode import BadImage, cause_of
from seer_scale.data.image_kinds import printable
from seer_scale.data.inspection import spread
from seer_scale.errors import examples
from seer_scale.evaluation.datasets.labelled import LabelledImages, open_labelled
from seer_scale.evaluation.features import tight_crop
from seer_scale.evaluation.labelled_crops import crop_batches
from seer_scale.evaluation.layerwise import open_layerwise
from seer_scale.evaluation.prototype_sheet import write_prototype_sheet
from seer_scale.evaluation.tasks.knn import knn_top1
from seer_scale.serving import WEIGHTS, load_trunk
from seer_scale.tracking.records import EVALUATED

SHEETS = "eval"  # folder for prototype sheets inside a run folder
WHOLE_BYTES = 4 << 30  # of a larger trunk, a rank holds one layer at a time
BAD = "eval/bad_images"  # the metric that counts images left out; absent if there are none
_QUERIES = 1024  # queries that are compared with the bank at once


class DuringTraining:
    """Judges checkpoints on one labelled set; all ranks create and call one together.

    Args:
        data: labelled set, as `open_labelled` takes it.
        size: side of the centre crop in pixels.
        k: number of neighbours that vote.
        temperature: temperature of the votes, see `knn_top1`.
        images: largest number of images used from each part, evenly spaced.
        batch: images per rank and forward pass.
        prototypes: rows of the prototype sheet; 0 draws no sheet.
        device: device of this rank.
        say: takes lines about the classes and images, see `open_labelled`, and names images that
            cannot be used.

    Raises:
        DataError: the labelled set cannot be used, see `open_labelled`.
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
        say: Callable[[str], None] | None = None,
    ) -> None:
        opened = open_labelled(data, say=say, option="eval.data=")
        self._bank, self._queries = (
            part.subset(spread(len(part), images)) for part in (opened.train, opened.val)
        )
        self._size, self._k, self._temperature = size, k, temperature
        self._batch, self._prototypes, self._device = batch, prototypes, device
        self._say, self._told = say or (lambda text: None), set[str]()

    def judge(self, checkpoint: Path) -> dict[str, float]:
        """Returns the metric `eval/knn_top1` of a checkpoint, the same on every rank.

        Images that cannot be read or decoded are named, counted as `eval/bad_images` and left out;
        without any other there is no `eval/knn_top1`. Rank 0 also draws the images nearest to each
        prototype, into `eval/` beside the checkpoints.
        """
        trunk = _open_trunk(checkpoint / "trunk", self._device)
        bank, bank_places, bad = extract_shared(
            trunk, self._bank, self._size, self._batch, self._device
        )
        queries, places, more = extract_shared(
            trunk, self._queries, self._size, self._batch, self._device
        )
        found = self._name([*bad, *more])
        if not (len(bank) and len(queries)):
            return found
        bank_images, targets = self._bank.subset(bank_places), self._queries.targets[places]
        del trunk
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        right, rank, world = 0, distributed.rank(), distributed.world_size()
        mine = torch.arange(rank, len(queries), world)
        for start in range(0, len(mine), _QUERIES):
            part = mine[start : start + _QUERIES]
            share = knn_top1(
                bank,
                bank_images.targets,
                queries[part],
                targets[part],
                k=self._k,
                temperature=self._temperature,
            )
            right += round(share * len(part))
        total = distributed.all_reduce(torch.tensor(right, device=self._device))
        if self._prototypes and distributed.is_main():
            path = sheet_of(checkpoint)
            path.parent.mkdir(exist_ok=True)
            reader = CheckpointReader(checkpoint)
            write_prototype_sheet(path, reader, bank, bank_images, rows=self._prototypes)
        return {EVALUATED: int(total) / len(queries), **found}

    def _name(self, bad: list[str]) -> dict[str, float]:
        """Names the images that could not be used, unless it was just said; counts them."""
        if set(bad) != self._told:
            self._told = set(bad)
            if bad:
                self._say(
                    f"warning: {len(bad)} of {len(self._bank) + len(self._queries)} images cannot "
                    f"be used and are left out ({examples(bad)}): remove or replace them"
                )
        return {BAD: float(len(bad))} if bad else {}


def _open_trunk(folder: Path, device: torch.device) -> nn.Module:
    """Opens a trunk: whole on every rank if that is little, else layer by layer."""
    if (folder / WEIGHTS).stat().st_size > WHOLE_BYTES:
        return open_layerwise(folder, device)
    return load_trunk(folder).to(device)


def sheet_of(checkpoint: Path) -> Path:
    """Returns the path of the prototype sheet of a checkpoint."""
    return checkpoint.parents[1] / SHEETS / f"prototypes_{checkpoint.name}.png"


@torch.inference_mode()
def extract_shared(
    trunk: nn.Module, images: LabelledImages, size: int, batch: int, device: torch.device
) -> tuple[Tensor, NDArray[np.int64], list[str]]:
    """Computes features on all ranks together, one rank each image; every rank gets all of them.

    Returns:
        features: float32 [M, C] of the images that can be read and decoded.
        places: positions of these among `images`, int64 [M], rising.
        bad: names and causes of the others, fit to print.
    """
    world, rank = distributed.world_size(), distributed.rank()
    share = -(-len(images) // world)
    # The last round wraps around, so that every rank has `share` images; repeats are cut off below.
    mine = (np.arange(share) * world + rank) % len(images)
    batches = (
        [(int(place), 0) for place in part] for part in np.array_split(mine, -(-share // batch))
    )
    bad: dict[int, str] = {}

    def blank(place: int, error: BadImage | OSError) -> Tensor:
        name = images.source.name(int(images.indices[place]))
        bad[place] = f"{printable(name)}: {cause_of(error)}"
        return torch.zeros(3, size, size)

    parts = [
        trunk(crops.to(device)).float()
        for crops, _ in crop_batches(images, batches, tight_crop(size), instead=blank)
    ]
    gathered = distributed.all_gather(torch.cat(parts)).cpu()  # [world * share, C], rank by rank
    in_order = gathered.view(world, share, -1).transpose(0, 1).reshape(world * share, -1)
    of_all = dict(sorted(distributed.gather_lists(list(bad.items()))))
    places = np.array([n for n in range(len(images)) if n not in of_all], dtype=np.int64)
    return in_order[places], places, list(of_all.values())
