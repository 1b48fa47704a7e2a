"""Exported trunks: the same features after a round trip, one clear sentence for every damage."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import transforms

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
    with pytest.raises(
        UserError, match=r"nowhere is neither a folder nor a file.*models:/NAME@latest"
    ):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no trunk"):
        load(tmp_path)


SIZE = 48
FORMS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda file: file.read_bytes(),
    "a list of bytes": lambda file: [file.read_bytes()],
    "a path": lambda file: [file],
    "text of a path": lambda file: [str(file)],
    "base64": lambda file: [base64.b64encode(file.read_bytes()).decode()],
    "a data address": lambda file: [
        f"data:image/jpeg;base64,{base64.b64encode(file.read_bytes()).decode()}"
    ],
    "an array of bytes": lambda file: np.array([file.read_bytes()]),
    "an array of objects": lambda file: np.array([file.read_bytes()], dtype=object),
    "an array of paths": lambda file: np.array([str(file)]),
}


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A JPEG on its side: EXIF says how to turn it."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    small.resize((150, 100), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", exif=exif)
    return tmp_path / "a.jpg"


@pytest.mark.parametrize("form", FORMS)
def test_encoded_images_are_shown_as_torchvision_would_show_them(
    form: str, trunk: nn.Module, photograph: Path, tmp_path: Path
) -> None:
    made = {"crop_sizes": [SIZE, 32], "crop_counts": [2, 4]}
    folder = export_trunk(trunk, tmp_path / "trunk", trunk=TRUNK, pretraining=made)
    show = transforms.Compose(
        [
            transforms.Resize(round(SIZE * 256 / 224)),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    shown = show(ImageOps.exif_transpose(Image.open(photograph)).convert("RGB"))
    with torch.inference_mode():
        expected = trunk(shown[None]).numpy()
    features = _load_pyfunc(str(folder)).predict(FORMS[form](photograph))
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_a_trunk_of_before_shows_images_at_224_pixels(exported: Path, photograph: Path) -> None:
    model = _load_pyfunc(str(exported))
    assert model.size == 224
    assert model.predict([photograph, photograph.read_bytes()]).shape == (2, model.trunk.width)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (
            ["nowhere.jpg"],
            r"images\[0\] \('nowhere.jpg'\).* neither a file that is there nor base64",
        ),
        ([b"\xff\xd8\xff", b""], r"images\[0\] \(3 bytes\) cannot be used: truncated"),
        (["YWJj"], r"images\[0\] \('YWJj'\) cannot be used: not an image"),
        ([b"GIF89a", 3], r"images\[0\]"),
        (np.zeros((1, 3, 32, 32), np.uint8), "images are uint8, but must be float32"),
        (np.array([["a.jpg"]], dtype=object), "neither an array of numbers nor encoded images"),
        ([[1.0], [1.0, 2.0]], "neither an array of numbers nor encoded images"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16), "neither an array of numbers nor encoded"),
    ],
)
def test_what_is_no_image_is_told_in_a_sentence(exported: Path, images: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        _load_pyfunc(str(exported)).predict(images)


def test_a_server_reads_no_file_of_its_disk(
    exported: Path, photograph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("__pyfunc_model_path__", "models:/seer/1")  # as in MLflow's scoring server
    with pytest.raises(DataError, match="not base64"):
        _load_pyfunc(str(exported)).predict([str(photograph)])
