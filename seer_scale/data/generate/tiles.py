"""Real training data without a download: tiles of photographs from two Python packages.

The wheels of scikit-image and scikit-learn contain photographs. Tiles are cut at random places and
scales; the label of a tile is its photograph. Training tiles come from the left part of each
photograph and query tiles from the rest, so that training never sees a pixel of a query.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from seer_scale.data.generate.folder import complete_folder
from seer_scale.errors import DataError

PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/brick.png"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/moon.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
"""Package and file of each photograph, in the order of the labels."""

TRAIN_SHARE = 0.6
TILE_SIDES = (64, 384)
_SETTINGS_FILE = "tiles.json"
_SHARD_TILES = 1000

Region = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


@dataclass(frozen=True)
class Tiles:
    """Folders of shards, each usable as `data.path`.

    Attributes:
        train: tiles for pretraining.
        knn_train: labelled tiles for the bank of a k-NN classifier.
        knn_test: labelled tiles that are its queries.
    """

    train: Path
    knn_train: Path
    knn_test: Path


@dataclass(frozen=True)
class _Settings:
    """All settings that decide the bytes of the tiles."""

    train_per_photograph: int
    bank_per_photograph: int
    queries_per_photograph: int
    size: int
    seed: int
    photographs: tuple[str, ...] = tuple(name for _, name in PHOTOGRAPHS)


def write_tiles(
    folder: str | os.PathLike[str],
    *,
    train_per_photograph: int = 160,
    bank_per_photograph: int = 60,
    queries_per_photograph: int = 40,
    size: int = 96,
    seed: int = 0,
) -> Tiles:
    """Writes shards of JPEG tiles to `train/`, `knn_train/` and `knn_test/` below `folder`, once.

    The folder appears complete or not at all. A second call with the same settings writes nothing.

    Args:
        folder: a folder that is missing, or was written by a call with the same settings.
        train_per_photograph: training tiles from the left part of each photograph.
        bank_per_photograph: tiles for the k-NN bank, from the same part.
        queries_per_photograph: query tiles from the right part of each photograph.
        size: side of a tile in pixels.
        seed: seed of places and scales.

    Raises:
        DataError: the folder holds something else or cannot be written, or the photographs are
            not installed.
    """
    target = Path(folder)
    settings = _Settings(
        train_per_photograph, bank_per_photograph, queries_per_photograph, size, seed
    )
    tiles = Tiles(target / "train", target / "knn_train", target / "knn_test")
    if target.exists():
        _check_written(target, settings)
        return tiles
    try:
        with complete_folder(target, "tiles") as unfinished:
            _write_all(unfinished, settings)
    except DataError:
        if not target.exists():
            raise
        _check_written(target, settings)  # another process was faster
    return tiles


def load_photographs() -> list[Image.Image]:
    """Loads the photographs as RGB images, in the order of their labels.

    Raises:
        DataError: scikit-image, scikit-learn or one of their photographs is not installed.
    """
    images = []
    for package, name in PHOTOGRAPHS:
        spec = find_spec(package)  # finds the package without its slow import
        root = spec.submodule_search_locations if spec else None
        path = Path(root[0], name) if root else None
        if path is None or not path.is_file():
            raise DataError(
                f"photograph {name} of {package} is not installed: the demo's tiles need"
                " scikit-image and scikit-learn"
            )
        images.append(Image.open(path).convert("RGB"))
    return images


def regions(image: Image.Image) -> tuple[Region, Region]:
    """Returns the regions of the training tiles and of the query tiles; they do not overlap."""
    border = round(image.width * TRAIN_SHARE)
    return (0, 0, border, image.height), (border, 0, image.width, image.height)


def _check_written(target: Path, settings: _Settings) -> None:
    try:
        found = json.loads((target / _SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        found = None
    if found != json.loads(_dump(settings)):
        raise DataError(
            f"{target} exists but does not hold the tiles asked for: remove it or name another"
            " folder"
        )


def _dump(settings: _Settings) -> str:
    return json.dumps(asdict(settings), indent=1)


def _write_all(folder: Path, settings: _Settings) -> None:
    photographs = load_photographs()
    splits = (
        ("train", settings.train_per_photograph, 0),
        ("knn_train", settings.bank_per_photograph, 0),
        ("knn_test", settings.queries_per_photograph, 1),
    )
    for number, (name, count, region) in enumerate(splits):
        samples: list[dict[str, bytes]] = []
        for label, image in enumerate(photographs):
            rng = np.random.default_rng((settings.seed, number, label))
            for box in _boxes(rng, regions(image)[region], count):
                tile = _encode(image, box, settings.size)
                about = {"photograph": PHOTOGRAPHS[label][1], "box": box}
                samples.append(
                    {"cls": b"%d" % label, "jpg": tile, "json": json.dumps(about).encode()}
                )
        _write_shards(folder / name, samples)
    (folder / _SETTINGS_FILE).write_text(_dump(settings))


def _boxes(rng: np.random.Generator, region: Region, count: int) -> Iterator[Region]:
    """Yields squares inside `region`; the logarithm of their side is uniform."""
    left, top, right, bottom = region
    low, high = TILE_SIDES[0], min(TILE_SIDES[1], right - left, bottom - top)
    for _ in range(count):
        side = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        x = int(rng.integers(left, right - side, endpoint=True))
        y = int(rng.integers(top, bottom - side, endpoint=True))
        yield x, y, x + side, y + side


def _encode(image: Image.Image, box: Region, size: int) -> bytes:
    tile = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    tile.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write_shards(folder: Path, samples: list[dict[str, bytes]]) -> None:
    """Writes WebDataset shards whose bytes depend only on the samples: no times, no owners."""
    folder.mkdir()
    for first in range(0, len(samples), _SHARD_TILES):
        shard = folder / f"{first // _SHARD_TILES:06d}.tar"
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, sample in enumerate(samples[first : first + _SHARD_TILES], first):
                for ending, content in sample.items():
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
