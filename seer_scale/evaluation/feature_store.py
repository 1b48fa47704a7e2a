"""Features that are computed once and kept on disk, in blocks, for all ranks, tasks and restarts.

A block holds fixed images and is computed in fixed batches by any one rank, so that features are
the same bit for bit under any number of processes. A killed evaluation loses only the blocks that
were being computed. All ranks must see the same file system.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.data import Source
from seer_scale.data.image_folder import ImageFolder
from seer_scale.data.middle_crop import MiddleCrop
from seer_scale.errors import DataError
from seer_scale.evaluation.datasets.labelled import LabelledImages
from seer_scale.evaluation.labelled_crops import crop_batches
from seer_scale.evaluation.maps import AVGPOOL, cells, check_maps, pooled_maps
from seer_scale.evaluation.task import Context
from seer_scale.storage.atomic import replaced_file
from seer_scale.storage.tensor_file import as_bytes

BATCH = 64
BLOCK = 4 * BATCH
_FORMAT = 1  # raise this number when the same images get other features

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class StoredFeatures:
    """Features float32 [count, width], in files of `BLOCK` rows."""

    folder: Path
    count: int
    width: int

    def blocks(self, first: int = 0, step: int = 1) -> Iterator[tuple[int, Floats]]:
        """Yields the first row's number and the rows [<= BLOCK, width] of every `step`th block."""
        for number in range(first, -(-self.count // BLOCK), step):
            yield number * BLOCK, np.load(block_path(self.folder, number))

    def all(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns all rows in memory, once: [count, width]."""
        found = torch.empty(self.count, self.width, dtype=dtype)
        for start, rows in self.blocks():
            found[start : start + len(rows)] = torch.from_numpy(rows)
        return found


def block_path(folder: Path, number: int) -> Path:
    """Returns the path of block `number`."""
    return folder / f"block_{number:06d}.npy"


def stored_features(
    context: Context,
    images: LabelledImages,
    *,
    size: int,
    maps: Sequence[str] = (AVGPOOL,),
) -> dict[str, StoredFeatures]:
    """Returns the features of centre crops by map; computes only the blocks that are missing.

    All ranks call this together.

    Args:
        context: trunk, folders and device.
        images: images in the order of the rows.
        size: side of the crop in pixels.
        maps: names from `seer_scale.evaluation.maps.map_names`, or with cells (`res4_1x6`).

    Raises:
        ConfigError: the trunk lacks one of the maps.
        DataError: an image cannot be read or decoded, or the folder cannot be written.
    """
    check_maps(context.trunk, list(maps))
    root = context.features or context.folder / "features"
    identity = {
        "format": _FORMAT,
        "weights": weights_digest(context.trunk),
        "images": images_digest(images),
        "size": size,
        "batch": BATCH,
    }
    stores = {}
    for name in maps:
        about = {**identity, "map": name, "cells": cells(context.trunk_name, name)}
        digest = xxhash.xxh3_128_hexdigest(json.dumps(about, sort_keys=True).encode())
        stores[name] = _open(root / digest, len(images), about)
    missing = distributed.broadcast_object(_missing(stores) if distributed.is_main() else None)
    if missing:
        context.say(
            f"computing features of {len(missing)} of {-(-len(images) // BLOCK)} blocks of "
            f"{BLOCK} images ({', '.join(maps)})"
        )
        mine = missing[distributed.rank() :: distributed.world_size()]
        _compute(context, images, mine, stores, size)
    distributed.barrier()
    found = {}
    for name, store in stores.items():
        width = np.load(block_path(store.folder, 0), mmap_mode="r").shape[1]
        found[name] = StoredFeatures(store.folder, store.count, width)
    return found


def weights_digest(trunk: nn.Module) -> str:
    """Returns 32 hex digits of the names and values of rank 0's tensors, the same on every rank."""
    if not distributed.is_main():
        return str(distributed.broadcast_object(None))
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(trunk.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(as_bytes(tensor.detach().cpu().contiguous()))
    return str(distributed.broadcast_object(digest.hexdigest()))


def images_digest(images: LabelledImages) -> str:
    """Returns 32 hex digits of the images' names, and of the sizes and times of local files."""
    digest = xxhash.xxh3_128()
    digest.update(images.source.version.encode())
    digest.update(np.ascontiguousarray(images.indices).tobytes())
    digest.update(_stamps(images.source, images.indices).tobytes())
    return str(distributed.broadcast_object(digest.hexdigest()))


def _stamps(source: Source, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns size in bytes and modification time in ns of each file [N, 2]; -1 inside a shard."""
    stamps = np.full((len(indices), 2), -1, dtype=np.int64)
    if not (distributed.is_main() and isinstance(source, ImageFolder)):
        return stamps
    for row, index in enumerate(indices.tolist()):
        try:
            status = os.stat(source.path(index))
        except OSError:
            continue
        stamps[row] = status.st_size, status.st_mtime_ns
    return stamps


def _open(folder: Path, count: int, about: Mapping[str, object]) -> StoredFeatures:
    """Creates the store in `folder`; its `about.json` says what the features were computed from."""
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replaced_file(folder / "about.json", writers=2) as fresh:
                fresh.write_text(json.dumps(about, indent=1) + "\n")
        except OSError as error:
            raise DataError(
                f"features cannot be written to {folder} ({error.strerror or error}): give "
                "another --features FOLDER"
            ) from error
    return StoredFeatures(folder, count, 0)


def _missing(stores: Mapping[str, StoredFeatures]) -> list[int]:
    """Returns the numbers of the blocks that are missing or damaged in any store."""
    missing = set()
    for store in stores.values():
        for number in range(-(-store.count // BLOCK)):
            rows = min(BLOCK, store.count - number * BLOCK)
            try:
                block = np.load(block_path(store.folder, number), mmap_mode="r")
            except (OSError, ValueError, EOFError):
                missing.add(number)
            else:
                if block.ndim != 2 or block.shape[0] != rows or block.dtype != np.float32:
                    missing.add(number)
    return sorted(missing)


@torch.inference_mode()
def _compute(
    context: Context,
    images: LabelledImages,
    numbers: Sequence[int],
    stores: Mapping[str, StoredFeatures],
    size: int,
) -> None:
    """Computes whole blocks, batch by batch, and writes each block when it is complete."""
    groups = [
        range(start, min(start + BATCH, (number + 1) * BLOCK, len(images)))
        for number in numbers
        for start in range(number * BLOCK, min((number + 1) * BLOCK, len(images)), BATCH)
    ]
    parts: dict[str, list[Tensor]] = {name: [] for name in stores}
    batches = crop_batches(
        images, ([(row, 0) for row in group] for group in groups), MiddleCrop(size)
    )
    for group, (crops, _) in zip(groups, batches, strict=True):
        vectors = pooled_maps(
            context.trunk, crops.to(context.device), list(stores), context.trunk_name
        )
        for name, values in vectors.items():
            parts[name].append(values.cpu())
        last = group[-1] + 1
        if last % BLOCK == 0 or last == len(images):
            for name, store in stores.items():
                _write(block_path(store.folder, group[-1] // BLOCK), torch.cat(parts[name]).numpy())
                parts[name] = []


def _write(path: Path, rows: Floats) -> None:
    """Writes a block in one step: a reader sees the whole block or no block."""
    try:
        # Several evaluations may compute the same block at the same time.
        with replaced_file(path, writers=2) as fresh, fresh.open("wb") as file:
            np.save(file, rows)
    except OSError as error:
        raise DataError(
            f"features cannot be written to {path.parent} ({error.strerror or error}): free some "
            "space, or give another --features FOLDER"
        ) from error
