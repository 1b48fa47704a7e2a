"""The rendered set: reproducible, balanced, and told by nothing but shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from seer_scale.commands.shapes import main
from seer_scale.data.generate.shapes import SHAPES, _placed, render, write_shapes
from seer_scale.errors import DataError
from seer_scale.evaluation.datasets.labelled import open_labelled

NAMES = sorted(SHAPES)


def drawn(per_class: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = [
        render(name, np.random.default_rng((first + index, number)), 64)
        for number, name in enumerate(NAMES)
        for index in range(per_class)
    ]
    return np.stack(images), np.repeat(np.arange(len(NAMES)), per_class)


def test_the_same_seed_gives_the_same_pixels_and_another_others(tmp_path: Path) -> None:
    folders = [
        write_shapes(tmp_path / name, train=24, val=12, size=32, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    files = [
        {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.png")}
        for folder in folders
    ]
    assert files[0] == files[1]
    assert files[0].keys() == files[2].keys()
    assert all(files[0][name] != files[2][name] for name in files[0])
    assert len(set(files[0].values())) == 36  # no image twice, in neither part


def test_it_opens_as_a_labelled_set(tmp_path: Path) -> None:
    data = open_labelled(str(write_shapes(tmp_path / "set", train=36, val=24, size=32)))
    assert data.classes == NAMES
    assert len(NAMES) >= 10
    assert data.train.targets.bincount().tolist() == [3] * len(NAMES)
    assert data.val.targets.bincount().tolist() == [2] * len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_mirror_images_of_themselves(name: str) -> None:
    import cv2

    mask = np.zeros((201, 201), dtype=np.uint8)
    outlines = [np.round(points * 80 + 100).astype(np.int32) for points in SHAPES[name]()]
    cv2.fillPoly(mask, outlines, 1)
    both = (mask & mask[:, ::-1]).sum() / (mask | mask[:, ::-1]).sum()
    assert both > 0.96  # but for pixels of the edge


@pytest.mark.parametrize("name", NAMES)
def test_every_class_covers_the_same_area(name: str) -> None:
    import cv2

    mask = np.zeros((300, 300), dtype=np.uint8)
    outlines = [
        np.round(points + 150).astype(np.int32) for points in _placed(SHAPES[name](), 8000.0, 0.2)
    ]
    cv2.fillPoly(mask, outlines, 1)
    # OpenCV fills the outline's own pixels too.
    assert int(mask.sum()) == pytest.approx(8000, rel=0.15)


def test_colours_tell_little_of_the_class() -> None:
    """Mean, deviation and histogram of every channel do not get a classifier far."""

    def statistics(images: np.ndarray) -> np.ndarray:
        flat = images.reshape(len(images), -1, 3).astype(float)
        histograms = [
            np.histogram(image[:, channel], 8, (0, 255))[0]
            for image in flat
            for channel in range(3)
        ]
        rows = np.array(histograms).reshape(len(images), -1)
        return np.hstack([flat.mean(1), flat.std(1), rows])

    (train, targets), (val, truth) = drawn(25), drawn(12, first=1000)
    scaler = StandardScaler().fit(statistics(train))
    model = LogisticRegression(C=0.1, max_iter=500).fit(
        scaler.transform(statistics(train)), targets
    )
    accuracy = model.score(scaler.transform(statistics(val)), truth)
    # Chance is 0.083. Of wide figures (ladder, dots, star) fewer find room than of compact ones
    # (disc, target), so images of these are darker: 0.28 was measured.
    assert accuracy < 0.33


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 and 50 images are too few: each part needs one of each"):
        write_shapes(tmp_path / "few", train=5, val=50)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(DataError, match="full is not empty: name a new folder"):
        write_shapes(tmp_path / "full")
    assert not list(tmp_path.glob(".*"))


def test_the_script_writes_the_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(out), "--train", "12", "--val", "12", "--size", "32"]) == 0
    assert f"12 training and 12 validation images: {out}" in capsys.readouterr().out
    assert len(list(out.rglob("*.png"))) == 24
    seeded = tmp_path / "seeded"
    assert main([str(seeded), "--train", "12", "--val", "12", "--size", "32", "--seed", "3"]) == 0
    asked = write_shapes(tmp_path / "asked", train=12, val=12, size=32, seed=3)
    for path in asked.rglob("*.png"):
        same = (seeded / path.relative_to(asked)).read_bytes() == path.read_bytes()
        assert same, path
