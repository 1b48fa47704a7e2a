"""Exports a trunk to ONNX for any batch, height and width, if ONNX Runtime agrees with torch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from seer_scale.convert.rebuild import rebuild
from seer_scale.convert.recognise import TrunkWeights
from seer_scale.errors import CheckpointError, UserError
from seer_scale.storage.atomic import filled_folder

TOLERANCE = 1e-4  # relative to the largest feature
OPSET = 18
_ONE_FILE = 2_000_000_000  # bytes; larger protobufs are not allowed, the tensors go beside them
# Batch, height and width of the images that both networks see; none is the traced one's.
_CHECKS = ((1, 64, 96), (3, 97, 64))


def write_onnx(source: TrunkWeights, out: Path) -> float:
    """Writes `images` [batch, 3, height, width] -> `features` [batch, width] in eval mode.

    Unlike other formats, ONNX needs memory for about three copies of the trunk.

    Args:
        source: the trunk.
        out: the `.onnx` file; beyond 2 GB its tensors go to `OUT.data`.

    Returns:
        The largest difference between ONNX Runtime's features and torch's, relative to the largest
        feature.

    Raises:
        UserError: if onnx, onnxscript or onnxruntime is not installed, or `out` is a folder.
        CheckpointError: if the two differ by more than `TOLERANCE`; then nothing is written.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--to onnx needs {error.name}; pip install onnx onnxscript onnxruntime"
        ) from None
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file, e.g. {out / 'trunk.onnx'}")
    module = rebuild(source).float().eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    with filled_folder(out.parent, last=out.name, beside=out) as fresh:
        _export(module, fresh / out.name, apart=size > _ONE_FILE)
        difference = largest_difference(module, fresh / out.name)
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"ONNX Runtime's features of {source.origin} differ from torch's by "
                f"{difference:.1e} of the largest; {TOLERANCE:.0e} is allowed, and nothing is "
                "written"
            )
    return difference


def largest_difference(module: nn.Module, path: Path) -> float:
    """Compares ONNX Runtime with torch on random images of several shapes, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, height, width in _CHECKS:
        images = torch.randn(batch, 3, height, width, generator=random)
        with torch.inference_mode():
            expected: Tensor = module(images)
        found = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
        if found.shape != expected.shape:
            return float("inf")
        scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
        worst = max(worst, float((found - expected).abs().max() / scale))
        if not torch.isfinite(found).all():
            return float("inf")
    return worst


def _export(module: nn.Module, path: Path, *, apart: bool) -> None:
    dynamic = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("height"),
        3: torch.export.Dim("width"),
    }
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        torch.onnx.export(
            module,
            (torch.randn(2, 3, 64, 80),),
            str(path),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=(dynamic,),
            opset_version=OPSET,
            external_data=apart,
            dynamo=True,
            verbose=False,
        )
