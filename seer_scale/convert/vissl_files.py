"""Reads VISSL's checkpoints of every layout as tensors `trunk.*` and `heads.*`.

Consolidated (one file), sharded (a file per rank, each with a piece of every tensor, as FairScale's
FSDP keeps them) and sliced (a file per tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer_scale.convert.pickles import Pickle, Stored, read_pickle
from seer_scale.convert.weights import Weights
from seer_scale.errors import CheckpointError
from seer_scale.storage.tensor_file import Kind

_TYPES = ("consolidated", "shard", "shard_list", "slice", "slice_list")
_RUN = 1 << 22  # elements of a piece that are read at once


def is_vissl(content: Any) -> bool:
    """Tells whether a pickle has VISSL's layout."""
    return isinstance(content, Mapping) and (
        "classy_state_dict" in content or content.get("type") in _TYPES
    )


def vissl_weights(pickle: Pickle) -> Weights:
    """Opens the trunk's tensors as `trunk.NAME`, the heads' as `heads.INDEX.NAME`.

    Raises:
        CheckpointError: if a file of the checkpoint is missing or damaged, or it is a single shard
            or slice.
    """
    content, path = pickle.content, pickle.path
    kind = content.get("type", "consolidated")
    if kind == "shard_list":
        found = _joined_shards([_beside(path, name) for name in content["shards"]])
    elif kind == "slice_list":
        found = _slices(content, path)
    elif kind in ("shard", "slice"):
        raise CheckpointError(
            f"{path} is one {kind} of a checkpoint; give the file that lists all of them "
            f"(its type is {kind}_list)"
        )
    else:
        found = {name: (stored.kind, stored.whole) for name, stored in _whole(content, path)}
    return Weights(
        str(path),
        {name: value[0] for name, value in found.items()},
        lambda name: found[name][1](),
        None,
        pickle.notes,
    )


def _model(content: Mapping[str, Any], path: Path, part: str = "model") -> Mapping[str, Any]:
    try:
        found = content["classy_state_dict"]["base_model"][part]
    except (KeyError, TypeError):
        found = None
    if not isinstance(found, Mapping) or "trunk" not in found:
        raise CheckpointError(
            f"{path} is not a whole VISSL checkpoint: it has no "
            f"classy_state_dict/base_model/{part}/trunk"
        )
    return found


def _heads(heads: Any) -> Iterator[tuple[str, Any]]:
    """Reads the heads: a list of dicts under FSDP, else one dict with prefixes `0.`, `1.`."""
    if isinstance(heads, Sequence):
        for index, head in enumerate(heads):
            yield from ((f"{index}.{name}", value) for name, value in head.items())
    elif heads:
        yield from heads.items()


def _whole(content: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Stored]]:
    model = _model(content, path)
    for name, value in model["trunk"].items():
        yield f"trunk.{name}", value
    for name, value in _heads(model.get("heads")):
        yield f"heads.{name}", value


def _beside(path: Path, name: str) -> Path:
    """Finds a listed file: at its path, or beside the list if the checkpoint was moved."""
    listed = Path(name)
    return listed if listed.is_absolute() and listed.is_file() else path.parent / listed.name


def _part(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}, which the checkpoint lists, is not there; copy it too")
    content = read_pickle(path).content
    return content if isinstance(content, Mapping) else {}


def _slices(content: Mapping[str, Any], path: Path) -> dict[str, tuple[Kind, Callable[[], Tensor]]]:
    # An older layout lists the trunk's slices alone.
    if "classy_state_dict" in content:
        model = _model(content, path)
    else:
        model = {"trunk": content.get("layers", {})}
    folder = path.parent / f"{path.stem}_layers"
    found = {}
    for part in ("trunk", "heads"):
        for name, listed in _heads(model.get(part)) if part == "heads" else model[part].items():
            file = Path(listed)
            if not file.is_file():
                file = folder / file.name
            weight = _part(file).get("weight")
            if not isinstance(weight, Stored):
                raise CheckpointError(f"{file} is not a slice of a checkpoint: it has no weight")
            found[f"{part}.{name}"] = (weight.kind, weight.whole)
    return found


def _joined_shards(paths: list[Path]) -> dict[str, tuple[Kind, Callable[[], Tensor]]]:
    contents = [_part(path) for path in paths]
    if not contents:
        raise CheckpointError("the list of shards is empty")
    models = [_model(content, path) for content, path in zip(contents, paths, strict=True)]
    metas = [_model(content, path, "meta") for content, path in zip(contents, paths, strict=True)]
    found = {}
    for name, value in _joined([m["trunk"] for m in models], [m["trunk"] for m in metas], paths):
        found[f"trunk.{name}"] = value
    heads = [model.get("heads") or [] for model in models]
    if isinstance(heads[0], Mapping):  # not sharded: the same on every rank
        for name, stored in heads[0].items():
            found[f"heads.{name}"] = (stored.kind, stored.whole)
        return found
    for index, head in enumerate(heads[0]):
        meta = [meta["heads"][index] for meta in metas]
        if not meta[0]:
            pairs: Any = ((name, (stored.kind, stored.whole)) for name, stored in head.items())
        else:
            pairs = _joined([rank[index] for rank in heads], meta, paths)
        for name, value in pairs:
            found[f"heads.{index}.{name}"] = value
    return found


def _joined(
    shards: list[Mapping[str, Stored]], metas: list[Mapping[str, Any]], paths: list[Path]
) -> Iterator[tuple[str, tuple[Kind, Callable[[], Tensor]]]]:
    """Joins the pieces of one sharded module to whole tensors.

    A parameter is cut flat into as many equal pieces as there are ranks, the last ones padded; with
    `flatten_parameters` several tensors one after another make one parameter.
    """
    for unit, wrapper in enumerate(metas[0]["param_metadata"]):
        path = wrapper["fsdp_path"]
        for own, meta in wrapper["params"].items():
            key = f"{path}.{own}" if path else own
            pieces = []
            ranks = 1 if wrapper.get("no_broadcast_optim_state") else len(shards)
            for rank in range(ranks):
                stored = shards[rank].get(key)
                if stored is None:
                    raise CheckpointError(f"{paths[rank]} has no piece of {key}")
                padding = metas[rank]["param_metadata"][unit]["params"][own]["padding"]
                pieces.append((stored, stored.kind.numel - int(padding)))
            numels = [int(numel) for numel in meta["numels"]]
            if sum(length for _, length in pieces) != sum(numels):
                raise CheckpointError(
                    f"the {len(pieces)} pieces of {key} hold {sum(n for _, n in pieces)} elements "
                    f"instead of {sum(numels)}; a shard is another run's ({paths[0]})"
                )
            begin = 0
            for name, shape, numel in zip(meta["names"], meta["shapes"], numels, strict=True):
                kind = Kind(pieces[0][0].kind.dtype, tuple(shape))
                full = f"{path}.{name}" if path else name
                yield full, (kind, _reader(pieces, begin, kind))
                begin += numel
    for name in metas[0]["buffer_names"]:  # every rank has them whole
        if name not in shards[0]:
            raise CheckpointError(f"{paths[0]} has no buffer {name}")
        yield name, (shards[0][name].kind, shards[0][name].whole)


def _reader(pieces: list[tuple[Stored, int]], begin: int, kind: Kind) -> Callable[[], Tensor]:
    def read() -> Tensor:
        out = torch.empty(kind.numel, dtype=kind.dtype)
        first = 0
        for stored, length in pieces:
            low, high = max(first, begin), min(first + length, begin + kind.numel)
            if low < high:
                for start in range(low, high, _RUN):
                    stop = min(start + _RUN, high)
                    out[start - begin : stop - begin] = stored.run(start - first, stop - first)
            first += length
        return out.view(kind.shape)

    return read
