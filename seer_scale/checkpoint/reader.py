"""Reading a checkpoint: any run of elements of any tensor, whatever slices it was written in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.checkpoint.manifest import one_line, rank_file, read_manifest
from seer_scale.errors import CheckpointError
from seer_scale.optim.slices import Slice, Values, with_padding
from seer_scale.storage.tensor_file import Kind, Stamp, TensorFile, stamp

# What a header that is not as it should be makes Python trip over.
_HOSTILE = (OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError,
            OverflowError)  # fmt: skip


class Piece(NamedTuple):
    """A run of a tensor's elements in a file, from `offset` on."""

    file: TensorFile
    offset: int
    length: int


class CheckpointReader:
    """Reads any part of any tensor of one checkpoint.

    Args:
        folder: of the checkpoint.
        manifest: of one that is still being written, and has none yet.

    Raises:
        CheckpointError: if the folder is empty, half written, damaged or of another format.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder) if manifest is None else manifest
        self.kinds: dict[str, Kind] = {}
        self._pieces: dict[str, list[Piece]] = {}
        self._files: list[TensorFile] = []
        for rank in range(self.manifest["world_size"]):
            self._index(rank_file(folder, rank))
        self._check_pieces()

    @property
    def names(self) -> list[str]:
        """Parameters and buffers, in no particular order."""
        return list(self.kinds)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter and buffer."""
        return {name: kind.shape for name, kind in self.kinds.items()}

    def has_momentum(self, name: str) -> bool:
        """Whether a tensor is a parameter, with optimizer state; buffers have none."""
        return f"momentum/{name}" in self._pieces[name][0].file.entries

    def read(self, name: str, offset: int, length: int, kind: str = "weight") -> Tensor:
        """Elements `offset` to `offset + length` of a tensor, flat; `kind` weight or momentum."""
        out = torch.empty(length, dtype=self.kinds[name].dtype)
        filled = 0
        try:
            for file, start, count in self._pieces[name]:
                low, high = max(start, offset), min(start + count, offset + length)
                if low < high:
                    part = out[low - offset : high - offset]
                    file.read(f"{kind}/{name}", low - start, high - start, part)
                    filled += high - low
        except (OSError, KeyError) as error:
            raise self._damaged(file.path, error) from None
        if filled != length:
            raise CheckpointError(
                f"{self.folder} holds {filled} of the {length} elements asked of {name}"
            )
        return out

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """A whole parameter or buffer."""
        _, shape = self.kinds[name]
        return self.read(name, 0, self.kinds[name].numel, kind).view(shape)

    def verify(self, part: int = 0, parts: int = 1) -> str | None:
        """Compares files with their checksums; what is wrong with the first that differs.

        Args:
            part: which share of the files, of `parts` equal ones: ranks read one each.
            parts: number of shares.
        """
        files: Mapping[str, Stamp] = self.manifest["files"]
        # By size: the shares take about equally long.
        order = sorted(files, key=lambda name: (-files[name].bytes, name))
        for name in order[part::parts]:
            try:
                actual = stamp(self.folder / name)
            except OSError as error:
                return f"{name} cannot be read ({one_line(error)})"
            if actual != files[name]:
                return f"{name} does not have the checksum it was written with"
        return None

    def check(self, model: nn.Module) -> None:
        """Compares names and shapes with those of `model`, which may be on meta.

        Raises:
            CheckpointError: if the checkpoint is another model's; names the differences.
        """
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        shapes = self.shapes
        differences = [
            *(f"{name} is missing" for name in tensors.keys() - shapes.keys()),
            *(f"{name} is not in the model" for name in shapes.keys() - tensors.keys()),
            *(
                f"{name} is {list(shapes[name])} instead of {list(tensor.shape)}"
                for name, tensor in tensors.items()
                if shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape)
            ),
        ]
        if differences:
            raise CheckpointError(
                f"{self.folder} is a checkpoint of another model ({self.manifest.get('trunk')}): "
                f"{len(differences)} tensors differ ({'; '.join(sorted(differences)[:3])}); resume "
                "with the recipe and model.* keys it was made with"
            )

    def values(self, model: nn.Module) -> Values:
        """Where a model takes its values from: any run of elements of any parameter or buffer.

        Raises:
            CheckpointError: as `check` does.
        """
        self.check(model)
        return lambda name, start, stop: self.read(name, start, stop - start)

    @torch.no_grad()
    def fill_momentum(self, slices: Iterable[Slice]) -> None:
        """Copies the optimizer state into a rank's slices, however they are cut."""

        def stored(name: str, start: int, stop: int) -> Tensor:
            return self.read(name, start, stop - start, kind="momentum")

        for part in slices:
            values = with_padding(stored, {part.name: part.padding} if part.padding else {})
            stop = part.offset + part.values.numel()
            part.momentum.copy_(values(part.name, part.offset, stop))

    def local_state(self, rank: int | None = None) -> dict[str, Tensor]:
        """What rank `rank` of the run that saved had as its own; this rank unless given."""
        file = self._files[distributed.rank() if rank is None else rank]
        try:
            return {
                key.removeprefix("local/"): file.whole(key)
                for key in file.entries
                if key.startswith("local/")
            }
        except OSError as error:
            raise self._damaged(file.path, error) from None

    def local_states(self) -> list[dict[str, Tensor]]:
        """What every rank had as its own, in rank order."""
        return [self.local_state(rank) for rank in range(len(self._files))]

    def _index(self, path: Path) -> None:
        try:
            file = TensorFile(path)
            self._files.append(file)
            for name, place in json.loads(file.metadata["placement"]).items():
                dtype, (length,) = file.entries[f"weight/{name}"].kind
                kind = Kind(dtype, tuple(map(int, place["shape"])))
                if min(kind.shape, default=0) < 0:
                    raise ValueError(f"{name} has a negative side")
                if self.kinds.setdefault(name, kind) != kind:
                    raise ValueError(f"{name} has another shape than in another file")
                self._pieces.setdefault(name, []).append(Piece(file, int(place["offset"]), length))
        except _HOSTILE as error:
            raise self._damaged(path, error) from None

    def _check_pieces(self) -> None:
        for name, pieces in self._pieces.items():
            end = 0
            for _, offset, length in sorted(pieces, key=lambda piece: piece.offset):
                if offset != end:
                    raise CheckpointError(
                        f"{self.folder} is damaged: the slices of {name} leave a gap or overlap "
                        f"at element {min(offset, end)}; resume from an older checkpoint"
                    )
                end = offset + length
            if end != self.kinds[name].numel:
                raise CheckpointError(
                    f"{self.folder} is damaged: it holds {end} of the {self.kinds[name].numel} "
                    f"elements of {name}; resume from an older checkpoint"
                )

    def _damaged(self, path: Path, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{path} is damaged ({one_line(error)}); resume from an older checkpoint"
        )


def verify_together(reader: CheckpointReader) -> str | None:
    """`CheckpointReader.verify`, each rank a share of the files; every rank gets the answer."""
    found = reader.verify(distributed.rank(), distributed.world_size())
    found_by_all: Sequence[str | None] = distributed.gather_lists([found])
    return next((text for text in found_by_all if text), None)


def lazily(
    reader: CheckpointReader, prefix: str
) -> tuple[dict[str, Kind], Callable[[str], Tensor]]:
    """What the tensors under `prefix` are, and a function that reads one, both without it."""
    kinds = {
        name.removeprefix(prefix): kind
        for name, kind in reader.kinds.items()
        if name.startswith(prefix)
    }
    return kinds, lambda name: reader.whole(prefix + name)
