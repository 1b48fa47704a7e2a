"""What is no weights, or not those asked for, is refused in one sentence that names it."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import seer_scale
from seer_scale.convert import convert, open_trunk
from seer_scale.errors import CheckpointError, ConfigError, UserError
from tests.convert.weights import assert_same_bits, random_trunk, write_source

TRUNK = "regnety_debug"


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


WRITERS: dict[str, Callable[[object, Path], object]] = {
    "zip": lambda value, path: torch.save(value, path),
    "before 1.6": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
    "pickle of protocol 2": lambda value, path: path.write_bytes(pickle.dumps(value, 2)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_pickle_that_asks_for_code_is_refused_and_named(writer: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "ran"
    WRITERS[writer]({"weight": torch.ones(2).tolist(), "x": Code(marker)}, path)
    with pytest.raises(CheckpointError, match=r"asks for posix\.system to be run") as caught:
        seer_scale.load(path)
    assert not marker.exists()
    assert len(str(caught.value).splitlines()) == 1


def test_an_onnx_file_is_named_an_export(tmp_path: Path) -> None:
    path = tmp_path / "trunk.onnx"
    path.write_bytes(b"\x08\x0a\x12\x07pytorch")
    with pytest.raises(CheckpointError, match="is an ONNX file, which is an export only: give the"):
        seer_scale.load(path)


def test_numpys_scalars_are_no_code_but_its_arrays_are_not_needed(tmp_path: Path) -> None:
    state = random_trunk(TRUNK).state_dict()
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": state, "loss": np.float32(1), "at": np.int64(3)}, path)
    assert_same_bits(dict(seer_scale.load(path).state_dict()), state)
    torch.save({"state_dict": state, "x": np.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"asks for numpy\S+_reconstruct to be run"):
        seer_scale.load(path)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.6, 0.999])
def test_a_pickle_that_is_cut_off(old: bool, share: float, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(random_trunk(TRUNK).state_dict(), path, _use_new_zipfile_serialization=not old)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"weights\.pth is (cut off|damaged)"):
        seer_scale.load(path)


@pytest.mark.parametrize("share", [0.00001, 0.01, 0.5, 0.9999])
def test_a_safetensors_file_that_is_cut_off(share: float, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_source(TRUNK, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged, cut off"):
        seer_scale.load(path)


@pytest.mark.parametrize("text", [b"", b"hello", b"PK", b"\x80\x02", b"{}", b"\x80\x04K\x01."])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_that_is_no_weights(text: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(CheckpointError, match="weights"):
        seer_scale.load(tmp_path / name)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a folder nor a file"):
        seer_scale.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no trunk: neither trunk\.safetensors"):
        seer_scale.load(tmp_path)
    with pytest.raises(UserError, match="write hf:ORG/NAME"):
        seer_scale.load("hf:facebook")


def test_another_architecture(tmp_path: Path) -> None:
    from torchvision.models import regnet_x_400mf, resnet18

    torch.save(resnet18().state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"resnet\.pth does not hold the weights of a RegNet"):
        seer_scale.load(tmp_path / "resnet.pth")
    torch.save(regnet_x_400mf().state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"none of the known trunks .* nearest is \w+, of"):
        seer_scale.load(tmp_path / "x.pth")
    write_source("regnety_200mf", tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match="states that it is regnety_200mf, not regnety_16gf"):
        open_trunk(tmp_path / "small.safetensors", trunk="regnety_16gf")
    torch.save(random_trunk("regnety_200mf").state_dict(), tmp_path / "small.pth")
    with pytest.raises(
        CheckpointError, match=r"not those of regnety_400mf: \d+ of 382 differ \(\S+ is \[24"
    ):
        open_trunk(tmp_path / "small.pth", trunk="regnety_400mf")
    with pytest.raises(ConfigError, match="did you mean regnety_16gf"):
        open_trunk(tmp_path / "small.pth", trunk="regnety_16g")


def test_tensors_too_many_and_missing_are_named(tmp_path: Path) -> None:
    state = random_trunk(TRUNK).state_dict()
    extra = {**state, "neck.weight": torch.ones(2)}
    torch.save(extra, tmp_path / "extra.pth")
    with pytest.raises(CheckpointError, match=r"1 tensors .* a known head \(neck\.weight\)"):
        seer_scale.load(tmp_path / "extra.pth")
    torch.save({**state, "trunk_output.block2.block2-9.f.a.0.weight": torch.ones(2)},
               tmp_path / "block.pth")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"block2-9\.f\.a\.0\.weight is too many"):
        seer_scale.load(tmp_path / "block.pth")
    missing = dict(state)
    del missing["trunk_output.block1.block1-0.proj.1.bias"]
    torch.save(missing, tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match=r"block1-0\.proj\.1\.bias is missing"):
        seer_scale.load(tmp_path / "missing.pth")
    torch.save({**state, **{f"ema.{name}": tensor for name, tensor in state.items()}},
               tmp_path / "two.pth")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"holds 2 trunks, under '', 'ema\."):
        seer_scale.load(tmp_path / "two.pth")


def test_counters_that_are_missing_are_reported(tmp_path: Path) -> None:
    state = random_trunk(TRUNK).state_dict()
    kept = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "bare.pth")
    found = open_trunk(tmp_path / "bare.pth")
    assert f"{len(state) - len(kept)} counters num_batches_tracked" in found.notes[0]
    assert_same_bits({name: found.read(name) for name in kept}, kept)


def test_an_index_with_a_part_missing(tmp_path: Path) -> None:
    state = random_trunk("regnety_200mf").state_dict()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    listed = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    assert_same_bits(dict(seer_scale.load(tmp_path).state_dict()), state)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lists b\.safetensors, which is not there"):
        seer_scale.load(tmp_path)


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    write_source(TRUNK, source)
    with pytest.raises(UserError, match="is a file; this format is a folder"):
        convert(source, "huggingface", source)
    with pytest.raises(UserError, match="is a folder; this format is a file"):
        convert(source, "torchvision", tmp_path)
    convert(source, "safetensors", tmp_path / "own")
    with pytest.raises(UserError, match=r"holds trunk\.safetensors already"):
        convert(source, "huggingface", tmp_path / "own")
    with pytest.raises(UserError, match="timm builds RegNets of 4 stages only"):
        convert(source, "timm", tmp_path / "timm")
    assert not (tmp_path / "timm").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        convert(source, "vissl", tmp_path / "file" / "below.torch")
    assert not list(tmp_path.rglob("*.writing"))
