"""Exported trunks: the same features after a round trip, one clear sentence for every damage."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from seer_scale.convert.loading import load
from seer_scale.errors import CheckpointError, DataError, UserError
from seer_scale.models import build_trunk
from seer_scale.serving import _load_pyfunc, export_trunk, load_trunk

TRUNK = "regnety_debug"


def trained_trunk() -> nn.Module:
    """A trunk whose BatchNorm statistics are not the initial ones."""
    torch.manual_seed(0)
    trunk = build_trunk(TRUNK)
    trunk(torch.randn(4, 3, 64, 64))
    return trunk.eval()


@pytest.fixture(scope="module")
def trunk() -> nn.Module:
    return trained_trunk()


@pytest.fixture
def exported(tmp_path: Path, trunk: nn.Module) -> Path:
    return export_trunk(trunk, tmp_path / "trunk", trunk=TRUNK, step=12, loss=3.5)


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
def test_features_are_those_of_the_exported_trunk(
    exported: Path, trunk: nn.Module, size: tuple[int, int]
) -> None:
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = trunk(images)
        loaded = load_trunk(exported)
        assert torch.equal(loaded(images), expected)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for given in (images, images.numpy(), images.tolist()):
        features = _load_pyfunc(str(exported)).predict(given)
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, expected.numpy())


def test_a_state_dict_exports_like_its_module(
    tmp_path: Path, exported: Path, trunk: nn.Module
) -> None:
    other = export_trunk(dict(trunk.state_dict()), tmp_path / "other", trunk=TRUNK)
    ours, theirs = (load_file(folder / "trunk.safetensors") for folder in (exported, other))
    assert ours.keys() == theirs.keys() == trunk.state_dict().keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_folder_says_what_it_is(exported: Path, trunk: nn.Module) -> None:
    assert sorted(path.name for path in exported.iterdir()) == ["config.json", "trunk.safetensors"]
    config = json.loads((exported / "config.json").read_text())
    assert (config["trunk"], config["step"], config["loss"]) == (TRUNK, 12, 3.5)
    assert config["width"] == trunk.width
    assert config["mean"] == [0.485, 0.456, 0.406]
    assert config["versions"]["torch"] == version("torch").split("+")[0]
    with safe_open(exported / "trunk.safetensors", "pt") as file:
        assert file.metadata()["trunk"] == TRUNK


def test_an_export_replaces_the_one_before(exported: Path, trunk: nn.Module) -> None:
    (exported.parent / "trunk.writing").mkdir()  # of an export that was killed
    export_trunk(trunk, exported, trunk=TRUNK, step=13)
    assert json.loads((exported / "config.json").read_text())["step"] == 13
    assert [path.name for path in exported.parent.iterdir()] == ["trunk"]


def test_another_model_is_refused_by_name(tmp_path: Path, trunk: nn.Module) -> None:
    state = dict(trunk.state_dict())
    name = next(iter(state))
    state["extra"] = state.pop(name)
    with pytest.raises(CheckpointError, match=r"2 of \d+ differ \(missing .*; unexpected extra\)"):
        export_trunk(state, tmp_path / "trunk", trunk=TRUNK)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_another_shape_is_named(exported: Path) -> None:
    path = exported / "trunk.safetensors"
    state = load_file(path)
    name = next(name for name, tensor in state.items() if tensor.ndim == 4)
    shape = list(state[name].shape)
    state[name] = state[name][1:].clone()
    save_file(state, path)
    with pytest.raises(CheckpointError) as caught:
        load_trunk(exported)
    assert f"{name} is {[shape[0] - 1, *shape[1:]]} instead of {shape}" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", None, "it has no config.json"),
        ("config.json", "{", "is damaged"),
        ("config.json", "[]", "is damaged"),
        ("config.json", '{"format": 2, "trunk": "regnety_debug"}', "has format 2"),
        ("trunk.safetensors", None, "it has no trunk.safetensors"),
        ("trunk.safetensors", "half", "is damaged"),
    ],
)
def test_a_damaged_folder_gets_a_sentence(
    exported: Path, file: str, content: str | None, sentence: str
) -> None:
    (exported / file).unlink()
    if content is not None:
        (exported / file).write_text(content)
    with pytest.raises(CheckpointError, match=sentence):
        load_trunk(exported)


def test_a_truncated_file_gets_a_sentence(exported: Path) -> None:
    path = exported / "trunk.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_trunk(exported)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3)])
def test_images_of_another_shape_are_refused(exported: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"\[batch, 3, height, width\] is needed"):
        _load_pyfunc(str(exported)).predict(np.zeros(shape, np.float32))


def test_load_finds_the_trunk_of_a_folder_a_checkpoint_and_a_run(
    tmp_path: Path, trunk: nn.Module
) -> None:
    first = build_trunk(TRUNK)
    run = tmp_path / "run"
    for step, model in ((9, first), (10, trunk)):
        export_trunk(model, run / "checkpoints" / f"step_{step:08d}" / "trunk", trunk=TRUNK)
    # A checkpoint that was being written when the run was killed.
    (run / "checkpoints" / "step_00000011.writing" / "trunk").mkdir(parents=True)

    def same(a: nn.Module, b: nn.Module) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))

    assert same(load(run), trunk)
    assert same(load(str(run / "checkpoints" / "step_00000009")), first)
    assert same(load(run / "checkpoints" / "step_00000010" / "trunk"), trunk)


def test_load_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nowhere is no folder.*models:/NAME@latest"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no trunk"):
        load(tmp_path)
