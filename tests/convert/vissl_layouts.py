"""Writes VISSL checkpoints in each layout that VISSL has, the way VISSL and FairScale do."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def content(trunk: Mapping[str, Tensor], heads: Any, meta: Any = None) -> dict[str, Any]:
    """As a training run saves it, with what else is in there."""
    model = {"model": {"trunk": dict(trunk), "heads": heads}}
    if meta is not None:
        model["meta"] = meta
    return {
        "phase_idx": 3,
        "iteration": 124500,
        "loss": {"num_iteration": 7, "meters": [np.float64(5.5), np.int64(3)]},
        "classy_state_dict": {"base_model": model, "optimizer": {"state": {}}},
    }


def write_consolidated(path: Path, trunk: Mapping[str, Tensor], heads: Any) -> None:
    torch.save({**content(trunk, heads), "type": "consolidated"}, path)


def shard(tensor: Tensor, rank: int, world: int) -> tuple[Tensor, int]:
    """FairScale's `_get_shard`: a flat piece, the last ones padded to the first one's length."""
    chunks = list(tensor.flatten().chunk(world))
    chunks += [chunks[0].new_empty(0)] * (world - len(chunks))
    padding = chunks[0].numel() - chunks[rank].numel()
    return F.pad(chunks[rank].clone(), [0, padding]), padding


def local_state(
    state: Mapping[str, Tensor], rank: int, world: int, flatten: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `local_state_dict` and `local_metadata_dict` give; a wrapper per module, as for BN.

    With `flatten` a wrapper's parameters are one flat parameter.
    """
    local: dict[str, Tensor] = {}
    wrappers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.endswith(BUFFERS):
            local[name] = tensor
            continue
        path, _, leaf = name.rpartition(".")
        wrappers.setdefault(path, {})[leaf] = tensor
    metadata = []
    for path, own in wrappers.items():
        groups = {"flat_param_0": own} if flatten else {leaf: {leaf: t} for leaf, t in own.items()}
        params = {}
        for backing, tensors in groups.items():
            joined = torch.cat([tensor.flatten() for tensor in tensors.values()])
            local[f"{path}.{backing}"], padding = shard(joined, rank, world)
            params[backing] = {
                "names": list(tensors),
                "shapes": [tensor.shape for tensor in tensors.values()],
                "numels": [tensor.numel() for tensor in tensors.values()],
                "padding": padding,
            }
        metadata.append(
            {
                "fsdp_path": path,
                "params": params,
                "no_broadcast_optim_state": False,
                "shared_param_info": [],
            }
        )
    buffers = [name for name in state if name.endswith(BUFFERS)]
    return local, {"param_metadata": metadata, "buffer_names": buffers}


def write_sharded(
    path: Path,
    trunk: Mapping[str, Tensor],
    heads: list[Mapping[str, Tensor]],
    world: int,
    flatten: bool = False,
    absolute: bool = False,
) -> None:
    names = [f"{path.stem}_shard{rank}.torch" for rank in range(world)]
    for rank, name in enumerate(names):
        local, meta = local_state(trunk, rank, world, flatten)
        pairs = [local_state(head, rank, world, flatten) for head in heads]
        whole = content(
            local,
            [state for state, _ in pairs],
            {"trunk": meta, "heads": [head_meta for _, head_meta in pairs]},
        )
        torch.save({**whole, "type": "shard"}, path.with_name(name))
    listed = [str(path.with_name(name).resolve()) for name in names] if absolute else names
    torch.save({"type": "shard_list", "shards": listed}, path)


def write_sliced(path: Path, trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
    folder = path.with_name(f"{path.stem}_layers")
    folder.mkdir()

    def save(name: str, tensor: Tensor) -> str:
        file = folder / f"{hashlib.sha1(name.encode()).hexdigest()}.torch"
        torch.save({"type": "slice", "weight": tensor}, file)
        return str(file.resolve())

    listed = {
        "trunk": {name: save(name, tensor) for name, tensor in trunk.items()},
        "heads": {name: save(name, tensor) for name, tensor in heads.items()},
    }
    torch.save({"type": "slice_list", "classy_state_dict": {"base_model": {"model": listed}}}, path)
