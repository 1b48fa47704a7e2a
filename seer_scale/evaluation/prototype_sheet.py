"""A contact sheet of prototypes: the images nearest to some of SwAV's prototypes.

SwAV (Caron et al., arXiv 2006.09882) works if images of one kind gather at one prototype.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from seer_scale.checkpoint import CheckpointReader
from seer_scale.data.contact_sheet import FAINT, INK, draw_cell, draw_sheet
from seer_scale.data.decode import BadImage, decode
from seer_scale.errors import CheckpointError
from seer_scale.evaluation.datasets.labelled import LabelledImages
from seer_scale.models.heads import ProjectionHead, Prototypes

_SIDE, _TITLE = 96, 108  # pixels: side of a thumbnail, width of a row's title


def write_prototype_sheet(
    path: Path,
    reader: CheckpointReader,
    features: Tensor,
    images: LabelledImages,
    *,
    rows: int = 8,
    columns: int = 8,
) -> Path:
    """Draws a row for each of the largest prototypes: those that most images are nearest to.

    Args:
        path: file of the picture, a PNG.
        reader: checkpoint of the pretrained model whose trunk computed `features`.
        features: features float32 [N, C] of the images.
        images: the N images; a label, if there is one, is written under its image.
        rows: number of prototypes to show.
        columns: number of images to show for each, nearest first.

    Returns:
        `path`.

    Raises:
        CheckpointError: the checkpoint has no projection head or no prototypes.
    """
    scores = score_prototypes(reader, features)  # [N, K]
    counts = torch.bincount(scores.argmax(1), minlength=scores.shape[1])
    # The sort is stable, so that the same checkpoint gives the same sheet.
    shown = counts.sort(descending=True, stable=True).indices[:rows].tolist()
    cells: list[list[Image.Image]] = []
    for prototype in shown:
        share = f"{int(counts[prototype]):,} of {len(images):,}"
        title = [(f"prototype {prototype}", INK), (share, FAINT)]
        cells.append([draw_cell(None, title, _TITLE)])
        nearest = scores[:, prototype].sort(descending=True, stable=True).indices[:columns]
        for place in nearest.tolist():
            below = f"{float(scores[place, prototype]):.2f}  {_label(images, place)}"
            cells[-1].append(draw_cell(_thumbnail(images, place), [(below, FAINT)], _SIDE))
    draw_sheet(cells).save(path)
    return path


@torch.inference_mode()
def score_prototypes(reader: CheckpointReader, features: Tensor) -> Tensor:
    """Computes the cosines of N images and K prototypes.

    Args:
        reader: checkpoint of a pretrained model.
        features: features float32 [N, C] that its trunk computed.

    Returns:
        Cosines float32 [N, K].

    Raises:
        CheckpointError: the checkpoint has no projection head or no prototypes.
    """
    names = [name for name in reader.names if name.startswith(("head.", "prototypes."))]
    if "prototypes.weight" not in names:
        raise CheckpointError(
            f"{reader.folder} has no prototypes: give a checkpoint of a pretraining run"
        )
    state = {name: reader.whole(name) for name in names}
    linear = [
        name
        for name, tensor in state.items()
        if name.startswith("head.") and name.endswith(".weight") and tensor.dim() == 2
    ]
    linear.sort(key=lambda name: int(name.split(".")[2]))
    dims = [state[name].shape[0] for name in linear]
    normed = any(name.endswith("running_var") for name in names)
    with torch.device("meta"):  # no values are drawn that would be overwritten
        head = ProjectionHead(features.shape[1], dims, normed).eval()
        prototypes = Prototypes(dims[-1], state["prototypes.weight"].shape[0])
    for prefix, module in (("head.", head), ("prototypes.", prototypes)):
        mine = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
        module.load_state_dict(mine, assign=True)
    scores: Tensor = prototypes(head(features))
    return scores


def _thumbnail(images: LabelledImages, place: int) -> Image.Image:
    index = int(images.indices[place])
    try:
        image = decode(images.source.read(index))
    except (BadImage, OSError):  # features were made of it a moment ago
        return Image.new("RGB", (_SIDE, _SIDE), FAINT)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=box)


def _label(images: LabelledImages, place: int) -> str:
    label = images.source.label(int(images.indices[place]))
    return "" if label is None else str(label)
