"""Joins slices to whole tensors in one or several safetensors files, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from seer_scale.checkpoint.reader import CheckpointReader
from seer_scale.errors import UserError
from seer_scale.storage.atomic import replaced_file, sync
from seer_scale.storage.ownership import owned
from seer_scale.storage.tensor_file import Kind, write_tensors

NAME = "model"


def consolidate(
    reader: CheckpointReader,
    target: Path,
    *,
    largest_bytes: int | None = None,
    momentum: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Writes whole tensors under their names; needs memory for the largest tensor only.

    Args:
        reader: reader of the checkpoint.
        target: folder for `model.safetensors`, or `model-00001-of-00003.safetensors` and so on
            with the index that Hugging Face's libraries read.
        largest_bytes: most bytes of a file, unless one tensor is larger; None for one file.
        momentum: write the optimizer state too, as `momentum/NAME`.
        say: is told of every file.

    Raises:
        UserError: if the target holds such files already, another process writes them, or the disk
            is full.
    """
    try:
        with owned(target, str(target), beside=True):
            return _consolidate(reader, target, largest_bytes, momentum, say)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None


def _consolidate(
    reader: CheckpointReader,
    target: Path,
    largest_bytes: int | None,
    momentum: bool,
    say: Callable[[str], None],
) -> list[Path]:
    if any(target.glob(f"{NAME}*.safetensors*")):
        raise UserError(f"{target} holds {NAME}*.safetensors already: give another folder")
    kinds = dict(reader.kinds)
    if momentum:
        kinds |= {f"momentum/{n}": k for n, k in reader.kinds.items() if reader.has_momentum(n)}
    parts = _divide(kinds, largest_bytes)
    names = [
        f"{NAME}-{index:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1
        else f"{NAME}.safetensors"
        for index in range(1, len(parts) + 1)
    ]  # fmt: skip

    def read(key: str) -> Tensor:
        name = key.removeprefix("momentum/")
        return reader.whole(name, "weight" if name == key else "momentum")

    metadata = {"format": "pt", "step": str(reader.manifest["step"])}
    for name, keys in zip(names, parts, strict=True):
        with replaced_file(target / name) as fresh:
            stamp = write_tensors(fresh, {key: kinds[key] for key in keys}, read, metadata)
        say(f"{target / name}  {stamp.bytes / 2**30:.3f} GiB  xxh128 {stamp.xxh128}")
    if len(parts) > 1:
        _write_index(target / f"{NAME}.safetensors.index.json", kinds, names, parts)
    sync(target)
    return [target / name for name in names]


def _divide(kinds: dict[str, Kind], largest_bytes: int | None) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    size = 0
    for key, kind in kinds.items():
        bytes_ = kind.bytes
        if largest_bytes and parts[-1] and size + bytes_ > largest_bytes:
            parts.append([])
            size = 0
        parts[-1].append(key)
        size += bytes_
    return parts


def _write_index(
    path: Path, kinds: dict[str, Kind], names: list[str], parts: list[list[str]]
) -> None:
    total = sum(kind.bytes for kind in kinds.values())
    where = {key: name for name, keys in zip(names, parts, strict=True) for key in keys}
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))
    sync(path)
