"""Files of torch, written a tensor at a time: their checksums are those of their bytes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from seer_scale.convert.torch_file import write_torch_file
from seer_scale.storage.tensor_file import CHUNK, Kind


def test_checksums_hold_for_tensors_of_more_than_one_piece(tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    tensors = {
        "large": torch.randn(CHUNK // 4 + 1000, generator=drawn),  # more than is written at once
        "small": torch.randn(3, 5, generator=drawn),
    }
    kinds = {name: Kind.of(tensor) for name, tensor in tensors.items()}
    write_torch_file(tmp_path / "it.pth", dict, kinds, tensors.__getitem__)
    with zipfile.ZipFile(tmp_path / "it.pth") as archive:
        assert archive.testzip() is None  # the name of the first entry with a wrong checksum
    loaded = torch.load(tmp_path / "it.pth", weights_only=True)
    assert {name: torch.equal(loaded[name], tensors[name]) for name in tensors} == {
        "large": True,
        "small": True,
    }
