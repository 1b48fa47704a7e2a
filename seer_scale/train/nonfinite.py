"""Losses that are not finite: whose they are, and a dump of what the ranks computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from seer_scale import distributed
from seer_scale.data import MicroBatch
from seer_scale.storage.tensor_file import Kind, write_tensors

SHOWN = 16  # sample ids per rank in a message


class Computed(NamedTuple):
    """Results of one micro-batch of this rank.

    Attributes:
        batch: the micro-batch.
        loss: its loss, [].
        scores: its scores, [crops * B + queue, K].
    """

    batch: MicroBatch
    loss: Tensor
    scores: Tensor


def culprits(step: Sequence[Computed]) -> str:
    """Names the ranks whose losses are not finite, with their samples; every rank calls this.

    Args:
        step: the micro-batches of this rank's step.
    """
    bad = [
        sample
        for batch, loss, _ in step
        if not torch.isfinite(loss)
        for sample in batch.sample_ids.tolist()
    ]
    found = []
    for rank, samples in distributed.gather_lists([(distributed.rank(), bad)]):
        if samples:
            more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
            shown = ", ".join(map(str, samples[:SHOWN]))
            found.append(f"rank {rank} (samples {shown}{more})")
    return ", ".join(found) or "no rank: every loss is finite, but the gradient is not"


def dump(folder: Path, step: Sequence[Computed]) -> str | None:
    """Writes `folder/rank_R.safetensors` on every rank; every rank calls this function.

    The keys end in the number M of the micro-batch and the number R of the resolution:
    `sample_ids.M` [B] int64, `loss.M` [], `scores.M` [crops * B + queue, K], and `crops.M.R`
    [count * B, 3, size, size] float32 as the model got them.

    Args:
        folder: folder to create.
        step: the micro-batches of this rank's step.

    Returns:
        Why a rank could not write its file; None if all could.
    """
    tensors: dict[str, Tensor] = {}
    for number, (batch, loss, scores) in enumerate(step):
        tensors[f"sample_ids.{number}"] = batch.sample_ids
        tensors[f"loss.{number}"] = loss
        tensors[f"scores.{number}"] = scores
        for resolution, crops in enumerate(batch.crops):
            tensors[f"crops.{number}.{resolution}"] = crops
    kinds = {key: Kind.of(tensor) for key, tensor in tensors.items()}
    problem: str | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{distributed.rank()}.safetensors"
        write_tensors(path, kinds, lambda key: tensors[key].detach().cpu().contiguous())
    except OSError as error:
        problem = f"rank {distributed.rank()}: {error.strerror or error}"
    return next((text for text in distributed.gather_lists([problem]) if text), None)
