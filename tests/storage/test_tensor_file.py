"""Streamed safetensors files: what the library writes is read, and what is written it reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from seer_scale.storage.tensor_file import (
    CHUNK,
    Kind,
    Stamp,
    TensorFile,
    lay_out,
    stamp,
    write_tensors,
)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "bytes": torch.randint(0, 255, (5,), dtype=torch.uint8, generator=generator),
        "count": torch.tensor(2**40 + 7),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(3, 3, generator=generator).to(torch.bfloat16),
        # more than is written at once, and no multiple of it
        "large": torch.randn(CHUNK // 4 + 1001, generator=generator),
        "matrix": torch.randn(7, 11, dtype=torch.float64, generator=generator),
    }


def write(path: Path, content: dict[str, Tensor]) -> Stamp:
    kinds = {key: Kind.of(value) for key, value in content.items()}
    return write_tensors(path, kinds, lambda key: content[key], {"a": "b"})


def test_the_library_reads_it_and_the_stamp_is_the_file_s(tmp_path: Path) -> None:
    content, path = tensors(), tmp_path / "file.safetensors"
    written = write(path, content)
    found = load_file(path)
    assert found.keys() == content.keys()
    assert all(torch.equal(found[key], value) for key, value in content.items())
    assert all(found[key].dtype == value.dtype for key, value in content.items())
    data = path.read_bytes()
    assert written == Stamp(len(data), xxhash.xxh3_128(data).hexdigest()) == stamp(path)


def test_the_library_s_files_are_read(tmp_path: Path) -> None:
    content, path = tensors(), tmp_path / "file.safetensors"
    save_file(content, path, metadata={"a": "b"})
    file = TensorFile(path)
    assert file.metadata == {"a": "b"}
    assert file.entries.keys() == content.keys()
    for key, value in content.items():
        assert torch.equal(file.whole(key), value), key
    large = content["large"]
    for start, stop in ((0, 1), (5, 5), (CHUNK // 4 - 3, CHUNK // 4 + 9), (1000, len(large))):
        assert torch.equal(file.read("large", start, stop), large[start:stop])
    out = torch.zeros(10)
    file.read("large", 3, 8, out[2:7])
    assert torch.equal(out, torch.cat([torch.zeros(2), large[3:8], torch.zeros(3)]))
    with pytest.raises(ValueError, match="contiguous"):
        file.read("large", 0, 5, torch.zeros(10)[::2])


def header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x00",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        header(a={**F32, "data_offsets": [0, 8]}) + bytes(7),
        header(a={**F32, "data_offsets": [0, 8]}) + bytes(9),
        header(a={**F32, "data_offsets": [0, 4]}) + bytes(4),
        header(a={**F32, "data_offsets": [4, 12]}) + bytes(12),
        header(a={**F32, "data_offsets": [0, 8]}, b={**F32, "data_offsets": [0, 8]}) + bytes(8),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError):  # noqa: PT011 (any sentence will do)
        TensorFile(path)


def test_tensors_begin_at_a_multiple_of_eight_bytes_whatever_the_header_says() -> None:
    for length in range(9):
        layout = lay_out({"a": Kind(torch.float64, (3,))}, {"note": "x" * length})
        assert layout.begins["a"] % 8 == 0
        assert layout.begins["a"] == len(layout.header)
        assert layout.bytes == len(layout.header) + 24
