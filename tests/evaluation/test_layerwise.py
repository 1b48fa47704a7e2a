"""A trunk read layer by layer: the same features to the last bit, one layer in memory."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.resident import resident_bytes
from seer_scale.errors import CheckpointError
from seer_scale.evaluation import during_training
from seer_scale.evaluation.layerwise import open_layerwise
from seer_scale.models import build_trunk, initialise
from seer_scale.serving import export_trunk, load_trunk

CPU = torch.device("cpu")


def exported(folder: Path, trunk: str) -> Path:
    model = build_trunk(trunk)
    initialise(model, 3)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 if "mean" in name else 1.0)
    return export_trunk(model, folder, trunk=trunk)


def test_features_are_the_same_to_the_last_bit_and_no_layer_stays(tmp_path: Path) -> None:
    folder = exported(tmp_path / "trunk", "regnety_debug")
    trunk = open_layerwise(folder, CPU)
    whole = load_trunk(folder)
    generator = torch.Generator().manual_seed(0)
    for images in (torch.rand(2, 3, 48, 48, generator=generator), torch.rand(3, 3, 64, 64)):
        with torch.inference_mode():
            assert torch.equal(trunk(images), whole(images))
        assert all(tensor.is_meta for tensor in (*trunk.parameters(), *trunk.buffers()))
    assert not trunk.training


def test_files_of_another_trunk_are_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path / "trunk", "regnety_debug")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("regnety_debug", "regnety_400mf"))
    with pytest.raises(CheckpointError, match=r"are not those of its config\.json"):
        open_layerwise(folder, CPU)
    (folder / "trunk.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"trunk\.safetensors is damaged"):
        open_layerwise(folder, CPU)


def test_only_a_large_trunk_is_read_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(tmp_path / "trunk", "regnety_debug")
    size = (folder / "trunk.safetensors").stat().st_size
    for limit, layerwise in ((size, False), (size - 1, True)):
        monkeypatch.setattr(during_training, "WHOLE_BYTES", limit)
        trunk = during_training._open_trunk(folder, CPU)
        assert next(trunk.parameters()).is_meta == layerwise


def grown(opened: Callable[..., nn.Module], small: Path, folder: Path, *more: Any) -> int:
    """Bytes by which the resident memory of this process grew at most, for one forward pass."""
    with torch.inference_mode():
        opened(small, *more)(torch.zeros(1, 3, 32, 32))  # what torch and imports take
        before = resident_bytes("VmRSS")
        opened(folder, *more)(torch.zeros(1, 3, 32, 32))
    return resident_bytes("VmHWM") - before


@pytest.mark.long
def test_a_rank_holds_little_more_than_a_layer(tmp_path: Path) -> None:
    """80 million parameters, of which the largest layer has 11 %."""
    folder = exported(tmp_path / "trunk", "regnety_16gf")
    small = exported(tmp_path / "small", "regnety_debug")
    size = (folder / "trunk.safetensors").stat().st_size
    found = []
    for case in ((load_trunk, small, folder), (open_layerwise, small, folder, CPU)):
        with get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(grown, case))
    assert found[0] > size  # so the measure sees a whole trunk
    layers = build_trunk("regnety_16gf", device="meta").modules()
    largest = max(sum(p.nbytes for p in layer.parameters(recurse=False)) for layer in layers)
    assert found[1] < 2 * largest  # the layer, and the kernels' own order of its weights
