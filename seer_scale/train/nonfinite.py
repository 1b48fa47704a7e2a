"""A loss that is not finite: on which ranks, of which images, and a dump of what they computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from seer_scale import distributed
from seer_scale.data import MicroBatch
from seer_scale.storage.tensor_file import Kind, write_tensors

SHOWN = 16  # sample ids that a sentence names, of each rank


def culprits(micro_batches: Sequence[MicroBatch], losses: Sequence[Tensor]) -> str:
    """The ranks whose losses are not finite, with their samples; every rank calls it.

    Args:
        micro_batches: of this rank's step.
        losses: one of each, [].
    """
    bad = [
        sample
        for batch, loss in zip(micro_batches, losses, strict=True)
        if not torch.isfinite(loss)
        for sample in batch.sample_ids.tolist()
    ]
    found = []
    for rank, samples in distributed.gather_lists([(distributed.rank(), bad)]):
        if samples:
            more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
            shown = ", ".join(map(str, samples[:SHOWN]))
            found.append(f"rank {rank} (samples {shown}{more})")
    return ", ".join(found) or "no rank: the losses are finite, their gradient is not"


def dump(
    folder: Path,
    micro_batches: Sequence[MicroBatch],
    losses: Sequence[Tensor],
    scores: Sequence[Tensor],
) -> str | None:
    """Writes `folder/rank_R.safetensors`; every rank calls it. Why it could not, if it could not.

    By number M of the micro-batch and R of the resolution: `sample_ids.M` [B] int64, `loss.M` [],
    `scores.M` [crops * B + queue, K], `crops.M.R` [count * B, 3, size, size] float32 as the model
    got them.
    """
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(micro_batches):
        tensors[f"sample_ids.{number}"] = batch.sample_ids
        tensors[f"loss.{number}"] = losses[number]
        tensors[f"scores.{number}"] = scores[number]
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
