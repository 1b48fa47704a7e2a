"""Tiny labelled sets for tests that train: four patterns in random colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CLASSES = ("bars", "checks", "disc", "rows")
SIZE = 48


def write_patterns(folder: Path, train: int = 64, val: int = 22) -> Path:
    """Writes `train` and `val` images in all, in one folder per class below each part."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            name = CLASSES[number % len(CLASSES)]
            path = folder / part / name / f"{name}_{part}_{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_draw(name, rng)).save(path)
    return folder


def _draw(name: str, rng: Any) -> Any:
    import numpy as np

    rows, columns = np.mgrid[:SIZE, :SIZE]
    shift, period = rng.integers(0, 12, 2), rng.integers(8, 13)
    on = {
        "bars": (columns + shift[0]) % period < period / 2,
        "rows": (rows + shift[0]) % period < period / 2,
        "checks": ((columns + shift[0]) % period < period / 2)
        ^ ((rows + shift[1]) % period < period / 2),
        "disc": np.hypot(rows - 18 - shift[0], columns - 18 - shift[1]) < period + 3,
    }[name]
    low, high = rng.integers(0, 110, 3), rng.integers(146, 256, 3)
    picture = np.where(on[..., None], high, low) + rng.normal(0, 8, (SIZE, SIZE, 3))
    return picture.clip(0, 255).astype(np.uint8)


def context(folder: Path, data: Path | str) -> Any:
    """Builds the context of an untrained `regnety_debug`, as the command does on every rank."""
    import torch

    from seer_scale.evaluation.task import Context
    from seer_scale.models import build_trunk

    return Context(
        model="random",
        trunk=build_trunk("regnety_debug").eval(),
        trunk_name="regnety_debug",
        data=str(data),
        folder=folder,
        device=torch.device("cpu"),
        say=print,
    )
