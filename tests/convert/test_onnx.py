"""The ONNX file gives torch's features at any batch, height and width, or is not written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seer_scale.convert import convert, onnx_export
from seer_scale.errors import CheckpointError
from tests.convert.weights import difference, images, random_trunk, write_source


@pytest.mark.slow
def test_onnx_runtime_gives_our_features(tmp_path: Path) -> None:
    import onnxruntime

    source, out = tmp_path / "source.safetensors", tmp_path / "trunk.onnx"
    write_source("regnety_200mf", source)
    found = convert(source, "onnx", out)
    assert "ONNX Runtime agrees with torch: largest relative difference" in found.notes[-1]
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    trunk = random_trunk("regnety_200mf").eval()
    for shape in ((1, 32, 32), (5, 224, 96), (2, 75, 111)):
        batch = images(*shape)
        (features,) = session.run(None, {"images": batch.numpy()})
        with torch.inference_mode():
            assert difference(torch.from_numpy(features), trunk(batch)) < 1e-4
    other = random_trunk("regnety_200mf", seed=1).eval()
    assert onnx_export.largest_difference(other, out) > 0.01


@pytest.mark.slow
def test_a_file_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "TOLERANCE", 0.0)  # rounding alone is more
    write_source("regnety_debug", tmp_path / "source.safetensors")
    with pytest.raises(CheckpointError, match=r"differ from torch's by \d"):
        convert(tmp_path / "source.safetensors", "onnx", tmp_path / "out" / "trunk.onnx")
    assert list((tmp_path / "out").iterdir()) == []
