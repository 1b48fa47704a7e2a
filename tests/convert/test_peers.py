"""A trunk in other projects' own model classes: the same features there, the same bits back."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.models.regnet import BlockParams
from torchvision.transforms import functional

import seer_scale
from seer_scale.convert import convert
from seer_scale.convert.names import GROUPED_TRUNKS, Dialect, to_dialect, to_grouped
from seer_scale.convert.peers import TIMM, TORCHVISION, huggingface_config, timm_config
from seer_scale.data.middle_crop import MiddleCrop
from seer_scale.errors import UserError
from seer_scale.models import TRUNKS, build_trunk
from seer_scale.serving import export_trunk
from tests.convert.vissl_model import VisslRegNet
from tests.convert.weights import assert_same_bits, difference, images, random_trunk, write_source

QUICK = ["regnety_debug", "regnety_200mf", "regnety_400mf", "regnety_800mf", "regnety_1_6gf"]
LONG = ["regnety_3_2gf", "regnety_8gf", "regnety_16gf"]
ON_META = [name for name in TRUNKS if name not in QUICK + LONG]
PEERS: list[Dialect] = ["torchvision", "timm", "huggingface", "vissl"]
NO_TIMM = "regnety_debug"  # three stages
RG10B_GROUPS = [[2], [7], [9, 17], [1]]


def torchvision_model(trunk: str) -> nn.Module:
    """torchvision's own network, with its own arithmetic where it gives the same widths."""
    config = TRUNKS[trunk]
    if trunk in TORCHVISION:
        with torch.device("cpu"):  # its arithmetic is on tensors
            params = BlockParams.from_init_params(
                config.depth,
                config.w_0,
                config.w_a,
                config.w_m,
                config.group_width,
                se_ratio=config.se_ratio,
            )
    else:
        params = BlockParams(
            depths=[s.depth for s in config.stages],
            widths=[s.width for s in config.stages],
            group_widths=[s.group_width for s in config.stages],
            bottleneck_multipliers=[1.0] * len(config.stages),
            strides=[2] * len(config.stages),
            se_ratio=config.se_ratio,
        )
    model: nn.Module = torchvision.models.RegNet(params)
    model.fc = nn.Identity()
    return model


def vissl_model(trunk: str) -> nn.Module:
    return VisslRegNet(TRUNKS[trunk], RG10B_GROUPS if trunk in GROUPED_TRUNKS else None)


def peer_model(peer: str, trunk: str) -> nn.Module:
    """The peer's network as its own library builds it from the config that we write."""
    if peer == "torchvision":
        return torchvision_model(trunk)
    if peer == "vissl":
        return vissl_model(trunk)
    if peer == "timm":
        import timm

        config = timm_config(trunk, 0, 224)
        return timm.create_model(
            config["architecture"], num_classes=0, **config.get("model_args", {})
        )
    from transformers import RegNetConfig, RegNetModel

    return RegNetModel(RegNetConfig(**huggingface_config(trunk, 0, "float32")))


def loaded(peer: str, trunk: str, path: Path) -> nn.Module:
    """The peer's network with what we wrote for it, loaded as its users do."""
    if peer == "timm":
        import timm

        return timm.create_model(f"local-dir:{path}", pretrained=True)
    if peer == "huggingface":
        from transformers import RegNetModel

        return RegNetModel.from_pretrained(path)
    model = peer_model(peer, trunk)
    state = torch.load(path, weights_only=True)
    if peer == "vissl":
        state = state["classy_state_dict"]["base_model"]["model"]["trunk"]
    model.load_state_dict(state, strict=True)
    return model


def features(peer: str, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output = model(batch)
        found: torch.Tensor = output.pooler_output.flatten(1) if peer == "huggingface" else output
        return found


def assert_agrees(peer: Dialect, trunk: str, folder: Path) -> None:
    source, out = folder / "source.safetensors", folder / peer
    state = write_source(trunk, source)
    convert(source, peer, out)
    back = seer_scale.load(out)
    assert_same_bits(back.state_dict(), state)
    model = loaded(peer, trunk, out)
    for mode in (False, True):
        # Small batches on small maps would divide by nearly nothing in train mode.
        batch = images(8 if mode else 2, 64 if mode else 96)
        ours, theirs = back.train(mode), model.train(mode)
        expected = features("ours", ours, batch)
        assert expected.std() > 1e-3
        assert difference(features(peer, theirs, batch), expected) < 1e-4, f"train={mode}"


@pytest.mark.long
@pytest.mark.parametrize("first", PEERS)
@pytest.mark.parametrize("second", PEERS)
def test_every_direction_gives_the_same_file(
    first: Dialect, second: Dialect, tmp_path: Path
) -> None:
    trunk = "regnety_200mf"
    write_source(trunk, tmp_path / "source.safetensors")
    convert(tmp_path / "source.safetensors", second, tmp_path / "direct")
    convert(tmp_path / "source.safetensors", first, tmp_path / "first")
    convert(tmp_path / "first", second, tmp_path / "over")
    assert_same_bits(*(tensors(tmp_path / name) for name in ("over", "direct")))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        return load_file(path / "model.safetensors")
    state = torch.load(path, weights_only=True)
    if "classy_state_dict" in state:
        state = state["classy_state_dict"]["base_model"]["model"]["trunk"]
    found: dict[str, torch.Tensor] = state
    return found


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("trunk", QUICK)
def test_features_agree_and_the_way_back_is_exact(
    trunk: str, peer: Dialect, tmp_path: Path
) -> None:
    if peer == "timm" and trunk == NO_TIMM:
        with pytest.raises(UserError, match=r"timm builds RegNets of 4 stages only .* has 3"):
            timm_config(trunk, 0, 224)
        return
    assert_agrees(peer, trunk, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("trunk", LONG)
def test_large_trunks_agree_too(trunk: str, peer: Dialect, tmp_path: Path) -> None:
    assert_agrees(peer, trunk, tmp_path)
    gc.collect()


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("trunk", ON_META)
def test_keys_and_shapes_of_the_largest_agree(trunk: str, peer: Dialect) -> None:
    ours = build_trunk(trunk, device="meta").state_dict()
    with torch.device("meta"):
        model = peer_model(peer, trunk)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if peer == "vissl" and trunk in GROUPED_TRUNKS:
        named = {to_grouped(name, trunk): tuple(t.shape) for name, t in ours.items()}
    else:
        named = {to_dialect(name, peer): tuple(t.shape) for name, t in ours.items()}
    assert named == theirs


@pytest.mark.parametrize("size", [224, 160, 64])
def test_peers_prepare_an_image_as_ours_is_prepared(tmp_path: Path, size: int) -> None:
    """Shorter side to 256/224 of the trained size, that from the middle, ImageNet's normalisation.

    At 160 pixels the shorter side is 183, but 160 / 0.875 is 182 rounded down, as peers do it.
    """
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform
    from transformers import AutoImageProcessor

    made: dict[str, Any] = (
        {} if size == 224 else {"pretraining": {"crop_sizes": [size, 32], "crop_counts": [2, 4]}}
    )
    trunk = random_trunk("regnety_200mf")
    export_trunk(trunk, tmp_path / "source", trunk="regnety_200mf", **made)
    for peer in ("timm", "huggingface"):
        convert(tmp_path / "source", peer, tmp_path / peer)
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((450, 300), Image.Resampling.BICUBIC)
    expected = MiddleCrop(size).cut(image)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    theirs = create_transform(**resolve_model_data_config(model), is_training=False)(image)
    torch.testing.assert_close(theirs, expected)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "huggingface")
    (theirs,) = processor(image, return_tensors="pt").pixel_values
    # Of an odd margin, torchvision cuts the larger half off where it rounds to it; they never do.
    resized = functional.resize(image, round(size * 256 / 224))
    left, top = ((side - size) // 2 for side in resized.size)
    cut = functional.to_tensor(functional.crop(resized, top, left, size, size))
    expected = functional.normalize(cut, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    # Up to two levels of 256, in units of the deviation: torch's resizing rounds another way.
    torch.testing.assert_close(theirs, expected, rtol=0, atol=2 / 256 / 0.224)


def test_timm_names_are_timms_own() -> None:
    import timm

    for trunk, name in TIMM.items():
        with torch.device("meta"):
            model: Any = timm.create_model(name, num_classes=0)
        expected = [stage.width for stage in TRUNKS[trunk].stages]
        assert [info["num_chs"] for info in model.feature_info[1:]] == expected


@pytest.mark.parametrize("trunk", ["regnety_800mf", "regnety_8gf"])
def test_torchvisions_networks_of_two_names_are_others(trunk: str) -> None:
    other = getattr(torchvision.models, trunk.replace("regnety", "regnet_y"))()
    other.fc = nn.Identity()
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    ours = {n: t.shape for n, t in build_trunk(trunk, device="meta").state_dict().items()}
    assert shapes.keys() == ours.keys()
    assert shapes != ours
    assert trunk not in TORCHVISION


@pytest.mark.parametrize("trunk", [t for t in TORCHVISION if t in QUICK])
def test_torchvisions_functions_of_these_names_load_our_file(trunk: str, tmp_path: Path) -> None:
    state = write_source(trunk, tmp_path / "source.safetensors")
    convert(tmp_path / "source.safetensors", "torchvision", tmp_path / "trunk.pth")
    model = getattr(torchvision.models, TORCHVISION[trunk])()
    answer = model.load_state_dict(torch.load(tmp_path / "trunk.pth"), strict=False)
    assert answer.missing_keys == ["fc.weight", "fc.bias"]
    assert answer.unexpected_keys == []
    del model.fc
    assert_same_bits(dict(model.state_dict()), state)


def test_a_wrong_tensor_would_be_noticed() -> None:
    trunk: Any = random_trunk("regnety_debug").eval()
    batch = images()
    expected = features("ours", trunk, batch)
    with torch.no_grad():
        trunk.trunk_output[0][0].f[3][1].running_mean.add_(0.1)
    assert difference(features("ours", trunk, batch), expected) > 1e-3
