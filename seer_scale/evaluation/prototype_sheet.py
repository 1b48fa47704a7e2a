"""What prototypes stand for: a contact sheet of the images nearest to a few of them.

Prototypes that gather images of one kind are what SwAV is meant to find (arXiv 2006.09882).
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from seer_scale.checkpoint import CheckpointReader
from seer_scale.data.decode import BadImage, decode
from seer_scale.errors import CheckpointError
from seer_scale.evaluation.datasets.labelled import LabelledImages
from seer_scale.models.heads import ProjectionHead, Prototypes

_SIDE, _MARGIN, _TITLE, _LINE = 96, 6, 120, 15  # pixels; a row's title is that wide
_INK, _PAPER, _FAINT = (20, 20, 20), (255, 255, 255), (110, 110, 110)


def write_prototype_sheet(
    path: Path,
    reader: CheckpointReader,
    features: Tensor,
    images: LabelledImages,
    *,
    rows: int = 8,
    columns: int = 8,
) -> Path:
    """Draws a row for each of the prototypes that most images are nearest to.

    Args:
        path: of the picture, a PNG.
        reader: of a checkpoint of a pretrained model, whose trunk gave `features`.
        features: float32 [N, C] of the images.
        images: N of them; classes are numbered under each, where there are any.
        rows: prototypes shown.
        columns: images shown of each, nearest first.

    Raises:
        CheckpointError: if the checkpoint has no head and prototypes.
    """
    scores = score_prototypes(reader, features)  # [N, K]
    counts = torch.bincount(scores.argmax(1), minlength=scores.shape[1])
    # A stable order, so that the same checkpoint gives the same sheet.
    shown = counts.sort(descending=True, stable=True).indices[:rows].tolist()
    columns = min(columns, len(images))
    width = _TITLE + columns * (_SIDE + _MARGIN) + _MARGIN
    height = _SIDE + _LINE + _MARGIN
    sheet = Image.new("RGB", (width, len(shown) * height + _MARGIN), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for row, prototype in enumerate(shown):
        top = _MARGIN + row * height
        draw.text((_MARGIN, top), f"prototype {prototype}", _INK, font)
        share = f"{int(counts[prototype]):,} of {len(images):,}"
        draw.text((_MARGIN, top + _LINE), share, _FAINT, font)
        nearest = scores[:, prototype].sort(descending=True, stable=True).indices[:columns]
        for column, place in enumerate(nearest.tolist()):
            left = _TITLE + column * (_SIDE + _MARGIN)
            sheet.paste(_thumbnail(images, place), (left, top))
            below = f"{float(scores[place, prototype]):.2f}  {_label(images, place)}"
            draw.text((left, top + _SIDE), below, _FAINT, font)
    sheet.save(path)
    return path


@torch.inference_mode()
def score_prototypes(reader: CheckpointReader, features: Tensor) -> Tensor:
    """Cosines float32 [N, K] of images, by their trunk's features [N, C], with the prototypes.

    Raises:
        CheckpointError: if the checkpoint has no head and prototypes.
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
        return Image.new("RGB", (_SIDE, _SIDE), _FAINT)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=box)


def _label(images: LabelledImages, place: int) -> str:
    label = images.source.label(int(images.indices[place]))
    return "" if label is None else str(label)[:9]
