"""Reads files of `torch.save` without running code in them and without reading their tensors.

Of a zip file (torch 1.6 and later) only the structure is loaded; values are read on demand. The
older format has no table of contents, so it is read whole.
"""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seer_scale.convert.weights import read_run
from seer_scale.errors import CheckpointError
from seer_scale.storage.tensor_file import Kind

# Numbers that numpy made, among a training run's meters; they hold no code.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "u1", "?")),
]
_HARMLESS = ("torch.", "collections.", "numpy.", "_codecs.encode", "builtins.set")
_WHOLE = "{} has the format of torch before 1.6, which is read into memory whole"


@dataclass(frozen=True)
class Stored:
    """A tensor of a pickle: kind, and a way to read any run of its elements."""

    kind: Kind
    run: Callable[[int, int], Tensor]

    def whole(self) -> Tensor:
        """Reads the whole tensor, contiguous, on the CPU."""
        return self.run(0, self.kind.numel).view(self.kind.shape)


@dataclass(frozen=True)
class Pickle:
    """Content of a pickle: nested plain Python values, with `Stored` in place of tensors."""

    path: Path
    content: Any
    notes: tuple[str, ...]


def is_pickle(path: Path) -> bool:
    """Tells whether a file begins like a file of `torch.save` or `pickle.dump`."""
    return _begin(path) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _begin(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def read_pickle(path: Path) -> Pickle:
    """Loads the structure of a file of `torch.save`.

    Raises:
        CheckpointError: if it is cut off or damaged, or asks for more than tensors and plain
            values: then nothing of it has been run, and what it asked for is named.
    """
    zipped = zipfile.is_zipfile(path)
    if not zipped and _begin(path) == b"PK":
        raise CheckpointError(f"{path} is cut off or damaged; copy or download it again")
    if asked := sorted(set(_asked_for(path, zipped))):
        raise _refused(path, ", ".join(asked[:3]))
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that torch does not write
            # On meta, tensors have shapes and their places in the file, and no memory.
            location = "meta" if zipped else "cpu"
            content = torch.load(path, map_location=location, weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        if asked_of_torch := re.search(r"GLOBAL (\S+)", str(error)):
            raise _refused(path, asked_of_torch[1]) from None
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(
            f"{path} is cut off or damaged, or no file of torch.save "
            f"({type(error).__name__}{': ' if first else ''}{''.join(first)[:80]}); "
            "copy or download it again"
        ) from None
    size = path.stat().st_size
    return Pickle(path, _stored(content, path, size), () if zipped else (_WHOLE.format(path),))


def _refused(path: Path, asked: str) -> CheckpointError:
    return CheckpointError(
        f"{path} asks for {asked} to be run when it is loaded, which no file of weights needs: it "
        "is refused"
    )


def _stored(value: Any, path: Path, size: int) -> Any:
    if isinstance(value, Tensor):
        return _in_memory(value) if value.device.type == "cpu" else _in_file(value, path, size)
    if isinstance(value, Mapping):
        return {key: _stored(item, path, size) for key, item in value.items()}
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, list | tuple):
        return [_stored(item, path, size) for item in value]
    return value


def _in_memory(tensor: Tensor) -> Stored:
    flat = tensor.detach().contiguous().view(-1)
    return Stored(Kind.of(tensor), lambda start, stop: flat[start:stop].clone())


def _in_file(tensor: Tensor, path: Path, size: int) -> Stored:
    item, stride, shape = tensor.dtype.itemsize, tensor.stride(), tuple(tensor.shape)
    storage: Any = tensor.untyped_storage()
    begin = int(storage._checkpoint_offset) + int(tensor.storage_offset()) * item
    if begin + tensor.numel() * item > size:
        raise CheckpointError(f"{path} is cut off in the middle of a tensor; copy it again")
    kind, contiguous = Kind(tensor.dtype, shape), tensor.is_contiguous()
    reach = sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) + 1

    def run(start: int, stop: int) -> Tensor:
        if contiguous:
            return read_run(path, begin + start * item, stop - start, kind.dtype)
        span = read_run(path, begin, reach, kind.dtype)
        return span.as_strided(shape, stride).reshape(-1)[start:stop].clone()

    return Stored(kind, run)


def _asked_for(path: Path, zipped: bool) -> Iterator[str]:
    """Lists forbidden imports of a pickle, read from its instructions without running them."""
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                entries = [n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"]
                programs = [archive.read(name) for name in entries]
            for program in programs:
                yield from _globals(program)
            return
        with path.open("rb") as file:
            # torch's older format is several pickles, then the tensors' bytes.
            while file.peek(1)[:1] == b"\x80":
                yield from _globals(file)
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError):
        return  # damaged: loading it says so


def _globals(program: Any) -> Iterator[str]:
    strings: list[str] = []
    for operation, argument, _ in pickletools.genops(program):
        name = ""
        if operation.name in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".")
        elif operation.name == "STACK_GLOBAL":
            name = ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)
        if name and not name.startswith(_HARMLESS):
            yield name
