"""Rendered sets whose classes even an untrained trunk tells apart a little, by a tint."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seer_scale.data.generate.shapes import write_shapes

_SHARE, _SPREAD = 0.5, 45.0  # of the tint, and of its chance from image to image


def tinted(folder: Path, train: int, val: int) -> Path:
    """Shapes under a veil of a colour of their class, which varies from image to image."""
    write_shapes(folder, train=train, val=val, size=40)
    rng = np.random.default_rng(0)
    names = sorted(path.name for path in (folder / "train").iterdir())
    for path in sorted(folder.rglob("*.png")):
        hue = names.index(path.parent.name) / len(names)
        tint = 255 * np.array(colorsys.hsv_to_rgb(hue, 0.9, 0.8)) + rng.normal(0, _SPREAD, 3)
        pixels = np.asarray(Image.open(path)) * (1 - _SHARE) + tint * _SHARE
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five blocks of features to train on and two to be judged by."""
    return tinted(tmp_path_factory.mktemp("data") / "shapes", train=1100, val=300)


@pytest.fixture(scope="session")
def few_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set that takes no time."""
    return tinted(tmp_path_factory.mktemp("data") / "few", train=96, val=48)
