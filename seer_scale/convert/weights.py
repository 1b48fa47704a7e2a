"""Named tensors on a disk, with their kinds; read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer_scale.errors import CheckpointError
from seer_scale.storage.tensor_file import Kind, read_into


@dataclass(frozen=True)
class Weights:
    """Tensors of a file or folder, under the names in it.

    Attributes:
        origin: name of the source in messages.
        kinds: dtype and shape of every tensor.
        read: a tensor's values on the CPU, contiguous.
        trunk: key of `TRUNKS`, where the source states it.
        notes: remarks for the user about the reading.
        pretraining: what made the trunk, where the source states it: `recipe`, `images` seen, ...
    """

    origin: str
    kinds: Mapping[str, Kind]
    read: Callable[[str], Tensor]
    trunk: str | None = None
    notes: tuple[str, ...] = field(default=())
    pretraining: Mapping[str, Any] = field(default_factory=dict)


def joined(origin: str, parts: list[Weights]) -> Weights:
    """Joins the tensors of several files.

    Raises:
        CheckpointError: if two files hold the same name.
    """
    owner: dict[str, Weights] = {}
    for part in parts:
        for name in part.kinds:
            if name in owner:
                raise CheckpointError(f"{origin} holds {name} twice; remove one of its files")
            owner[name] = part
    return Weights(
        origin,
        {name: part.kinds[name] for name, part in owner.items()},
        lambda name: owner[name].read(name),
        next((part.trunk for part in parts if part.trunk), None),
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def read_run(path: Path, begin: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Reads a run of elements of a file, from byte `begin` on.

    Raises:
        CheckpointError: if the file ends before.
    """
    values = torch.empty(numel, dtype=dtype)
    if not read_into(path, begin, values):
        raise CheckpointError(f"{path} is cut off in the middle of a tensor")
    return values
