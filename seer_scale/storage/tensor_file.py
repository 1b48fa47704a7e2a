"""Streams safetensors files: writes tensor by tensor with a checksum, reads any run of elements.

The library's own functions need all tensors in memory at once, and map whole files into memory to
read them. Here billions of parameters pass through a few megabytes. Any safetensors library reads
these files, and files of any safetensors library are read here.
"""

from __future__ import annotations

import json
import math
import os
import struct
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from seer_scale.storage.disk import DiskWriter

CHUNK = 4 << 20  # bytes that are read at once
_LARGEST_HEADER = 100 << 20  # as the format has it

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Kind(NamedTuple):
    """Type and shape of a tensor, without values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Kind of `tensor`."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Length in bytes."""
        return self.numel * self.dtype.itemsize


class Stamp(NamedTuple):
    """Length and checksum of a file: XXH3 of 128 bits, as `xxhsum -H2` prints it."""

    bytes: int
    xxh128: str


class Entry(NamedTuple):
    """A tensor in a file: kind and first byte."""

    kind: Kind
    begin: int


class Layout(NamedTuple):
    """Layout of a file's bytes.

    Attributes:
        header: everything before the first tensor.
        begins: first byte of each tensor in the file, in the order of writing.
        bytes: length of the file.
    """

    header: bytes
    begins: dict[str, int]
    bytes: int


def lay_out(kinds: Mapping[str, Kind], metadata: Mapping[str, str] | None = None) -> Layout:
    """Lays out a safetensors file of these tensors."""
    # As the library orders them: a multiple of its own size is where each tensor begins.
    keys = sorted(kinds, key=lambda key: (-kinds[key].dtype.itemsize, key))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    end = 0
    for key in keys:
        dtype, shape = kinds[key]
        begins[key], end = end, end + kinds[key].bytes
        offsets = [begins[key], end]
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    whole = struct.pack("<Q", len(text)) + text
    return Layout(whole, {key: start + begin for key, begin in begins.items()}, start + end)


# Puts the bytes of a tensor, from this one of them on, into memory until that is full.
Fill = Callable[[str, int, NDArray[np.uint8]], None]


def write_tensors(
    path: Path,
    kinds: Mapping[str, Kind],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Stamp:
    """Writes a safetensors file to the disk; one tensor is in memory at a time.

    Args:
        path: path of the file; what was there is replaced.
        kinds: dtype and shape of every tensor.
        read: gives a tensor's values on the CPU, contiguous, when its turn comes.
        metadata: further entries of the header.

    Raises:
        OSError: if the disk is full or does not write.
    """
    return stream_tensors(path, kinds, from_tensors(kinds, read), metadata)


def from_tensors(kinds: Mapping[str, Kind], read: Callable[[str], Tensor]) -> Fill:
    """Returns a source of bytes for `stream_tensors`, which reads each tensor at its first byte."""
    name: str | None = None
    data = memoryview(b"")

    def fill(key: str, start: int, target: NDArray[np.uint8]) -> None:
        nonlocal name, data
        if key != name:
            data = memoryview(b"")  # or two are in memory while the next is read
            tensor = read(key)
            if Kind.of(tensor) != kinds[key]:
                raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, not {kinds[key]}")
            name, data = key, as_bytes(tensor)
        copy_bytes(data, start, target)

    return fill


def stream_tensors(
    path: Path, kinds: Mapping[str, Kind], fill: Fill, metadata: Mapping[str, str] | None = None
) -> Stamp:
    """Writes a safetensors file; asks for its bytes in order, some megabytes at a time.

    Args:
        path: path of the file; what was there is replaced.
        kinds: dtype and shape of every tensor.
        fill: the source; it is asked for every byte of a tensor once.
        metadata: further entries of the header.

    Raises:
        OSError: if the disk is full or does not write.
    """
    layout = lay_out(kinds, metadata)
    digest = xxhash.xxh3_128()  # ten times SHA-256's speed; made against accidents
    with DiskWriter(path) as file:
        digest.update(layout.header)
        file.write(layout.header)
        for key in layout.begins:
            start, size = 0, kinds[key].bytes
            while start < size:
                room = file.room()[: size - start]
                fill(key, start, room)
                digest.update(room.data)  # while it is still in the processor's cache
                file.advance(len(room))
                start += len(room)
        file.finish()
    return Stamp(layout.bytes, digest.hexdigest())


def copy_bytes(data: memoryview, start: int, target: NDArray[np.uint8]) -> None:
    """Fills `target` with bytes from `start` on; other threads run meanwhile."""
    np.copyto(target, np.frombuffer(data[start : start + len(target)], dtype=np.uint8))


class TensorFile:
    """Reads a safetensors file in runs of elements; needs memory for the run only.

    The file stays open from the first run on, until `close` or the end of this object.

    Raises:
        ValueError: if the file does not follow the format.
        OSError: if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._descriptor: int | None = None
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(size - 8, _LARGEST_HEADER):
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        self.metadata = header.pop("__metadata__", {})
        end = 8 + length
        for key, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind = Kind(DTYPES[fields["dtype"]], tuple(map(int, fields["shape"])))
            begin, stop = (8 + length + int(offset) for offset in fields["data_offsets"])
            if begin != end or stop - begin != kind.bytes:
                raise ValueError(f"the bytes of {key} are not where they should be")
            self.entries[key] = Entry(kind, begin)
            end = stop
        if end != size:
            raise ValueError(f"it is {size} bytes long instead of {end}")

    def read(self, key: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Reads flat elements `start` to `stop` of a tensor, into `out` [stop - start] if given."""
        (dtype, _), begin = self.entries[key]
        target = torch.empty(stop - start, dtype=dtype) if out is None else out
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self._closed = weakref.finalize(self, os.close, self._descriptor)
        if not _fill(self._descriptor, begin + start * dtype.itemsize, target):
            raise OSError(f"{self.path} ends in the middle of {key}")
        return target

    def whole(self, key: str) -> Tensor:
        """Reads a whole tensor."""
        kind = self.entries[key].kind
        return self.read(key, 0, kind.numel).view(kind.shape)

    def close(self) -> None:
        """Closes the file, which the next run of elements opens again."""
        if self._descriptor is not None:
            self._descriptor = None
            self._closed()


def read_into(path: Path, begin: int, target: Tensor) -> bool:
    """Fills a contiguous CPU tensor with a file's bytes from `begin` on; False at the file's end.

    Nothing is mapped: mapped pages would count as the process's own memory.

    Raises:
        OSError: if the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        return _fill(file.fileno(), begin, target)


def _fill(descriptor: int, begin: int, target: Tensor) -> bool:
    data = as_bytes(target)
    while data:
        count = os.preadv(descriptor, [data[:CHUNK]], begin)
        if count == 0:
            return False
        data, begin = data[count:], begin + count
    return True


def stamp(path: Path) -> Stamp:
    """Reads a file once; returns its length and checksum.

    Raises:
        OSError: if it cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(CHUNK)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return Stamp(size, digest.hexdigest())


def as_bytes(tensor: Tensor) -> memoryview:
    """Memory of a contiguous tensor on the CPU, without a copy."""
    if not tensor.is_contiguous():  # reshape would copy, and reading would fill the copy
        raise ValueError("the tensor is not contiguous")
    data: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return data
