"""Encoded images as a caller has them: bytes, paths or base64; one normalised batch comes out."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer_scale.data.decode import BadImage, cause_of
from seer_scale.data.middle_crop import MiddleCrop
from seer_scale.errors import DataError

_DATA_ADDRESS = "data:"  # data:image/jpeg;base64,...
_SHOWN = 40  # characters of an item in a message


def middle_crops(items: Sequence[Any], size: int, *, paths: bool) -> Tensor:
    """Decodes images and cuts the middle of each: float32 [B, 3, size, size], normalised.

    Args:
        items: bytes of a file, its path, or its bytes in base64 (also as a `data:` address).
        size: side of the crop in pixels; the shorter side is resized to 256/224 of it before.
        paths: whether text may be the path of a file on this machine.

    Raises:
        DataError: an image cannot be read or decoded; the sentence says which.
    """
    crop = MiddleCrop(size)
    made = []
    for number, item in enumerate(items):
        try:
            made.append(crop(_bytes_of(item, paths), number))
        except (BadImage, OSError) as error:
            raise DataError(
                f"images[{number}] ({_shown(item)}) cannot be used: {cause_of(error)}"
            ) from None
    return torch.stack(made)


def _bytes_of(item: Any, paths: bool) -> bytes:
    """Returns the bytes of an image file.

    Raises:
        BadImage: the item is of another kind, or its text is neither the name of a file nor base64.
        OSError: the file cannot be read.
    """
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str | os.PathLike):
        raise BadImage(f"{type(item).__name__} is neither bytes nor text")
    if isinstance(item, os.PathLike) or (paths and _is_file(item)):
        return Path(item).expanduser().read_bytes()
    text = item.partition(",")[2] if item.startswith(_DATA_ADDRESS) else item
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        kinds = "neither a file that is there nor base64" if paths else "not base64"
        raise BadImage(kinds) from None


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a path, or holds a zero
        return False


def _shown(item: Any) -> str:
    text = f"{len(item):,} bytes" if isinstance(item, bytes) else repr(str(item))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
