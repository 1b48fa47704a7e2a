"""Reads any run of elements of any tensor of a checkpoint, however the tensor was sliced."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from xxhash import xxh3_128_hexdigest

from seer_scale import distributed
from seer_scale.checkpoint.manifest import one_line, rank_file, read_manifest
from seer_scale.checkpoint.placement import SLICES, Placement, from_headers, read_joined
from seer_scale.errors import CheckpointError
from seer_scale.optim.filling import fill_together
from seer_scale.optim.slices import Slice, Values, with_padding
from seer_scale.storage.tensor_file import Kind, Stamp, TensorFile, stamp

# What a header that is not as it should be makes Python trip over.
_HOSTILE = (OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError,
            OverflowError)  # fmt: skip


def most_open() -> int:
    """Half of the files that this process may open: usually 512, one for each rank of SEER's."""
    return max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class CheckpointReader:
    """Reads any part of any tensor of one checkpoint.

    A checkpoint that has an index opens a rank's file when it is first read from; of others all
    headers are read now.

    Args:
        folder: folder of the checkpoint.
        manifest: manifest of a checkpoint that is still being written, and has none yet.
        part, parts: the share of the files whose length is compared now, for ranks that share.

    Raises:
        CheckpointError: if the folder is empty, half written, damaged or of another format.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any] | None = None,
        *,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, part, parts) if manifest is None else manifest
        self._files: dict[int, TensorFile] = {}
        self._open: dict[int, TensorFile] = {}  # the ones that may be open, oldest first
        self._most_open = most_open()
        self._rows = self._index()
        self.kinds = {name: row.kind for name, row in self._rows.items()}
        for name, row in self._rows.items():
            if problem := row.problem():
                raise CheckpointError(
                    f"{folder} is damaged: {problem % name}; resume from an older checkpoint"
                )

    @property
    def names(self) -> list[str]:
        """Parameters and buffers, in no particular order."""
        return list(self.kinds)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter and buffer."""
        return {name: kind.shape for name, kind in self.kinds.items()}

    def has_momentum(self, name: str) -> bool:
        """Tells whether a tensor is a parameter; buffers have no momentum."""
        return self._rows[name].momentum

    def read(self, name: str, offset: int, length: int, kind: str = "weight") -> Tensor:
        """Reads flat elements `offset` to `offset + length`; `kind` is weight or momentum."""
        out = torch.empty(length, dtype=self.kinds[name].dtype)
        filled, path, key = 0, self.folder, f"{kind}/{name}"
        try:
            for rank, start, count in self._rows[name].parts(offset, offset + length):
                path = rank_file(self.folder, rank)
                file = self._file(rank)
                if file.entries[key].kind != (out.dtype, (count,)):
                    raise ValueError(f"{key} is not as {SLICES} has it")
                low, high = max(start, offset), min(start + count, offset + length)
                part = out[low - offset : high - offset]
                file.read(key, low - start, high - start, part)
                filled += high - low
        except _HOSTILE as error:
            raise self._damaged(path, error) from None
        if filled != length:
            raise CheckpointError(
                f"{self.folder} holds {filled} of the {length} elements asked of {name}"
            )
        return out

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """Reads a whole parameter or buffer."""
        _, shape = self.kinds[name]
        return self.read(name, 0, self.kinds[name].numel, kind).view(shape)

    def verify(self, part: int = 0, parts: int = 1, *, trunk: bool = True) -> str | None:
        """Compares files with their checksums; describes the first difference, or returns None.

        Args:
            part: which share of the files, of `parts` equal ones: ranks read one each. On the
                number of ranks that saved, a rank reads the file that it resumes from.
            parts: number of shares.
            trunk: compare `trunk/` too, which resuming does not need.
        """
        files: Mapping[str, Stamp] = self.manifest["files"]
        names = sorted(name for name in files if trunk or not name.startswith("trunk/"))
        for name in names[part::parts]:
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
        """Returns a function that reads any run of elements of any parameter or buffer.

        Raises:
            CheckpointError: as `check` does.
        """
        self.check(model)
        return lambda name, start, stop: self.read(name, start, stop - start)

    @torch.no_grad()
    def fill_momentum(self, slices: Iterable[Slice], *, together: bool = False) -> None:
        """Copies the optimizer state into a rank's slices, however they are cut.

        Args:
            slices: slices of this rank.
            together: every rank has the same ones and calls this, so each reads a share.
        """

        def stored(name: str, start: int, stop: int) -> Tensor:
            return self.read(name, start, stop - start, kind="momentum")

        if together:
            mine = list(slices)
            paddings = {part.name: part.padding for part in mine if part.padding}
            fill_together(
                [(part.name, part.momentum) for part in mine], with_padding(stored, paddings)
            )
            return
        for part in slices:
            values = with_padding(stored, {part.name: part.padding} if part.padding else {})
            stop = part.offset + part.values.numel()
            part.momentum.copy_(values(part.name, part.offset, stop))

    def local_state(self, rank: int | None = None) -> dict[str, Tensor]:
        """State that rank `rank` of the saving run had; this rank unless given."""
        rank = distributed.rank() if rank is None else rank
        try:
            file = self._file(rank)
            return {
                key.removeprefix("local/"): file.whole(key)
                for key in file.entries
                if key.startswith("local/")
            }
        except _HOSTILE as error:
            raise self._damaged(rank_file(self.folder, rank), error) from None

    def local_states(self) -> list[dict[str, Tensor]]:
        """States that the ranks of the saving run had for themselves, in rank order.

        Every rank calls this; each reads a share of the files.
        """
        saved, ranks = self.manifest["world_size"], distributed.world_size()
        mine = [(r, self.local_state(r)) for r in range(distributed.rank(), saved, ranks)]
        found: list[tuple[int, dict[str, Tensor]]] = distributed.gather_lists(mine)
        return [state for _, state in sorted(found, key=lambda one: one[0])]

    def close(self) -> None:
        """Closes files, which otherwise keep their room on the disk after they are deleted."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _index(self) -> Placement:
        ranks, path = range(self.manifest["world_size"]), self.folder / SLICES
        known: Stamp | None = self.manifest["files"].get(SLICES)
        try:
            if known:
                text = path.read_bytes()
                if Stamp(len(text), xxh3_128_hexdigest(text)) != known:
                    raise ValueError("it does not have the checksum it was written with")
                return read_joined(text, len(ranks))
            for rank in ranks:
                path = rank_file(self.folder, rank)
                self._files[rank] = TensorFile(path)
            return from_headers(self._files.values())
        except _HOSTILE as error:
            raise self._damaged(path, error) from None

    def _file(self, rank: int) -> TensorFile:
        """Opens a rank's file, or finds it open."""
        file = self._files.get(rank)
        if file is None:
            file = self._files[rank] = TensorFile(rank_file(self.folder, rank))
        if rank not in self._open:
            if len(self._open) >= self._most_open:
                self._open.pop(next(iter(self._open))).close()
            self._open[rank] = file
        return file

    def _damaged(self, path: Path, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{path} is damaged ({one_line(error)}); resume from an older checkpoint"
        )


def verify_together(reader: CheckpointReader) -> str | None:
    """Verifies all files that resuming needs, each rank a share; every rank gets the answer."""
    found = reader.verify(distributed.rank(), distributed.world_size(), trunk=False)
    found_by_all: Sequence[str | None] = distributed.gather_lists([found])
    return next((text for text in found_by_all if text), None)


def lazily(
    reader: CheckpointReader, prefix: str
) -> tuple[dict[str, Kind], Callable[[str], Tensor]]:
    """Returns the kinds of the tensors under `prefix` and a function that reads one; names without
    the prefix."""
    kinds = {
        name.removeprefix(prefix): kind
        for name, kind in reader.kinds.items()
        if name.startswith(prefix)
    }
    return kinds, lambda name: reader.whole(prefix + name)
