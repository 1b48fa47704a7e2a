"""Writes a file that `torch.load(weights_only=True)` reads, one tensor in memory at a time.

torch lays out the file without the tensors' bytes; the bytes and their zip checksums are written
afterwards.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer_scale.storage.tensor_file import CHUNK, Kind, as_bytes

_ENTRY = 46  # bytes of an entry of a zip file's directory before the name
_CHECKSUM = 16  # where its checksum stands in it


def write_torch_file(
    path: Path, nest: Callable[[Mapping[str, Any]], Any], kinds: Mapping[str, Kind],
    read: Callable[[str], Tensor],
) -> None:  # fmt: skip
    """Writes tensors as `torch.save` does.

    Args:
        path: path of the file; what was there is replaced.
        nest: from tensors by name to the object that is saved; it may rename and nest them.
        kinds: dtype and shape of every tensor.
        read: gives a tensor's values on the CPU, contiguous, when its turn comes.

    Raises:
        OSError: if the disk is full or does not write.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # seconds to import

    with FakeTensorMode():
        empty = {name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in kinds.items()}
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(nest(empty), path)
    except RuntimeError:
        # torch's writer does not say what the disk told it; if it was the disk, it says so again.
        with path.open("wb") as file:
            size = sum(kind.bytes for kind in kinds.values())
            os.posix_fallocate(file.fileno(), 0, size)
        raise
    # Loading with names for a nest tells where each tensor's bytes belong.
    places = _places(path, nest, kinds)
    checksums = {}
    with path.open("r+b", buffering=0) as file:
        for name, begin in sorted(places.items(), key=lambda item: item[1]):
            tensor = read(name)
            if Kind.of(tensor) != kinds[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
            data, at, checksum = as_bytes(tensor), begin, 0
            while data:
                count = os.pwrite(file.fileno(), data[:CHUNK], at)
                checksum = zlib.crc32(data[:count], checksum)
                data, at = data[count:], at + count
            checksums[begin] = checksum
            del tensor, data  # or two are in memory while the next is read
        _put_checksums(path, file.fileno(), checksums)
        os.fsync(file.fileno())


def _places(
    path: Path, nest: Callable[[Mapping[str, Any]], Any], kinds: Mapping[str, Kind]
) -> dict[str, int]:
    """First byte of each tensor in the file; tensors without elements have none."""
    loaded = torch.load(path, map_location="meta", weights_only=True)
    # The same walk over the same nest, of names and of tensors, pairs them.
    markers = nest({name: _Marker(name) for name in kinds})
    places: dict[str, int] = {}

    def walk(marker: Any, value: Any) -> None:
        if isinstance(marker, _Marker):
            if value.numel():
                places[marker.name] = int(value.untyped_storage()._checkpoint_offset)
        elif isinstance(marker, Mapping):
            for key in marker:
                walk(marker[key], value[key])

    walk(markers, loaded)
    return places


class _Marker:
    """Placeholder of a tensor, with its name."""

    def __init__(self, name: str) -> None:
        self.name = name


def _put_checksums(path: Path, descriptor: int, checksums: Mapping[int, int]) -> None:
    """Writes each record's CRC-32 where zip has it: in the directory and behind the bytes."""
    with zipfile.ZipFile(path) as archive:
        entries, at = archive.infolist(), archive.start_dir
    for entry in entries:
        header = os.pread(descriptor, 30, entry.header_offset)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        begin = entry.header_offset + 30 + name_length + extra_length
        if (checksum := checksums.get(begin)) is not None and entry.file_size:
            packed = struct.pack("<I", checksum)
            os.pwrite(descriptor, packed, at + _CHECKSUM)
            if entry.flag_bits & 8:  # it also follows the bytes, behind a signature
                os.pwrite(descriptor, packed, begin + entry.file_size + 4)
            else:
                os.pwrite(descriptor, packed, entry.header_offset + 14)
        raw = os.pread(descriptor, _ENTRY, at)
        at += _ENTRY + sum(struct.unpack("<HHH", raw[28:34]))
