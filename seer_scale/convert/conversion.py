"""Converts a trunk from any source to any format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from seer_scale.convert.exports import (
    write_huggingface,
    write_own,
    write_timm,
    write_torchvision,
    write_vissl,
)
from seer_scale.convert.files import open_weights
from seer_scale.convert.locating import locate
from seer_scale.convert.model_card import write_card
from seer_scale.convert.recognise import TrunkWeights, recognise
from seer_scale.errors import ConfigError, UserError
from seer_scale.storage.ownership import owned

Format = Literal["vissl", "timm", "huggingface", "torchvision", "safetensors", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
_WRITERS = {
    "vissl": write_vissl,
    "timm": write_timm,
    "huggingface": write_huggingface,
    "torchvision": write_torchvision,
    "safetensors": write_own,
}
_WITH_SWAV = ("vissl", "safetensors")


def open_trunk(
    source: str | os.PathLike[str], *, trunk: str | None = None, tracking_uri: str | None = None
) -> TrunkWeights:
    """Opens a source's trunk under our names, without reading a tensor.

    Args:
        source: see `seer_scale.load`.
        trunk: key of `TRUNKS` that it has to be.
        tracking_uri: address of the registry of `models:/`.

    Raises:
        UserError: if there is no such source.
        CheckpointError: if it is damaged, asks for code, or is not a trunk or another one.
    """
    return recognise(open_weights(locate(source, tracking_uri)), trunk)


def convert(
    source: str | os.PathLike[str],
    to: Format,
    out: str | os.PathLike[str],
    *,
    trunk: str | None = None,
) -> TrunkWeights:
    """Writes a source's trunk in a format, with a model card beside it.

    Args:
        source: see `seer_scale.load`.
        to: the format.
        out: a folder for timm and huggingface, a file for vissl, torchvision and onnx, either for
            safetensors.
        trunk: key of `TRUNKS` that it has to be.

    Returns:
        What was converted; its notes say what was dropped, and how an ONNX file was checked.

    Raises:
        UserError: if there is no such source, `out` cannot be written, or another process does.
        CheckpointError: if the source is damaged, asks for code, or is not a trunk or another one.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to {to} is not a format; known are {', '.join(FORMATS)}")
    found, target = open_trunk(source, trunk=trunk), Path(out)
    if to not in _WITH_SWAV and (swav := found.head.swav):
        found = found.with_notes(
            f"dropped the SwAV head ({len(swav)} tensors): {to} has no place for it"
        )
    if to == "onnx" and found.head.classes:
        found = found.with_notes("dropped the classifier: the ONNX file is the trunk alone")
    try:
        with owned(target, f"--out {target}", beside=True):
            if to == "onnx":
                from seer_scale.convert.onnx_export import TOLERANCE, write_onnx

                difference = write_onnx(found, target)
                found = found.with_notes(
                    f"ONNX Runtime agrees with torch: largest relative difference {difference:.1e} "
                    f"(allowed {TOLERANCE:.0e})"
                )
            else:
                _WRITERS[to](found, target)
            folder = target if target.is_dir() else target.parent
            write_card(folder / "README.md", found, to, target.name)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    return found
