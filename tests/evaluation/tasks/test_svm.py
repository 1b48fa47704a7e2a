"""SVMs: scikit-learn's own average precision, VOC's layout, and what is wrong with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from seer_scale.errors import DataError
from seer_scale.evaluation.datasets.voc import open_multi_label
from seer_scale.evaluation.feature_store import stored_features
from seer_scale.evaluation.tasks import svm
from tests.evaluation.contexts import context

COSTS = [0.1, 10.0]
OPTIONS = svm.Options(costs=COSTS, size=32)


@pytest.fixture(scope="module")
def voc(few_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOC's layout of shapes: two classes that overlap, some images hard to see."""
    root = tmp_path_factory.mktemp("voc") / "VOCdevkit" / "VOC2007"
    (root / "JPEGImages").mkdir(parents=True)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    wanted = {"round": {"disc", "ring", "target"}, "hollow": {"ring", "frame"}}
    for part, name in (("train", "trainval"), ("val", "test")):
        files = sorted((few_shapes / part).rglob("*.png"))
        lines: dict[str, list[str]] = {key: [] for key in wanted}
        for number, file in enumerate(files):
            stem = f"{name}{number:04d}"
            shutil.copy(file, root / "JPEGImages" / f"{stem}.png")
            for key, classes in wanted.items():
                mark = 0 if number % 17 == 3 else 1 if file.parent.name in classes else -1
                lines[key].append(f"{stem} {mark:2d}\n")
        for key, text in lines.items():
            (lists / f"{key}_{name}.txt").write_text("".join(text))
    return root.parents[1]


def test_the_figures_are_scikit_learns_own(voc: Path, tmp_path: Path) -> None:
    own = context(voc / "VOCdevkit/VOC2007/JPEGImages", tmp_path)
    own = context_of(own, voc)
    result = svm.run(own, OPTIONS)
    data = open_multi_label(str(voc))
    assert data.classes == ["hollow", "round"]
    train, val = (
        F.normalize(stored_features(own, part.images, size=32)["avgpool"].all(), dim=1).numpy()
        for part in (data.train, data.val)
    )
    expected = []
    for number in range(2):
        marks, truth = data.train.marks[:, number], data.val.marks[:, number]
        used, judged = marks != 0, truth != 0
        assert 0 < judged.sum() < len(truth)

        def machine(cost: float) -> LinearSVC:
            weights = {1: 2.0, -1: 1.0}
            return LinearSVC(C=cost, class_weight=weights, max_iter=2000, random_state=0, dual=True)

        means = [
            cross_val_score(
                machine(cost), train[used], marks[used], cv=3, scoring="average_precision"
            ).mean()
            for cost in COSTS
        ]
        best = COSTS[int(np.argmax(means))]
        scores = machine(best).fit(train[used], marks[used]).decision_function(val[judged])
        expected.append(average_precision_score(truth[judged] == 1, scores))
        row = result.details["per_class"][number]
        assert row["cost"] == best
        assert row["cross_validated_ap"] == pytest.approx(max(means), abs=1e-9)
        assert row["ap"] == pytest.approx(expected[-1], abs=1e-9)
    assert result.metrics["map"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert result.metrics["map"] > 0.3  # a sixth and a quarter of the images have the classes


def context_of(own: Any, data: Path) -> Any:
    from dataclasses import replace

    return replace(own, data=str(data))


def test_a_labelled_folder_is_one_class_against_the_rest(few_shapes: Path, tmp_path: Path) -> None:
    result = svm.run(context(few_shapes, tmp_path), svm.Options(costs=[1.0], size=32))
    assert len(result.details["per_class"]) == 12
    assert result.metrics["map"] > 1.5 / 12


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("round_test.txt", None, r"round_test\.txt cannot be read"),
        ("round_test.txt", "", r"round_test\.txt is empty"),
        ("round_test.txt", "x 2\n", r"line 1: 'x 2' is not an image's name and 1, -1 or 0"),
        ("round_test.txt", "other 1\n", "does not list the same images as hollow_test.txt"),
    ],
)
def test_what_is_wrong_with_voc_is_named(
    voc: Path, tmp_path: Path, file: str, text: str | None, expected: str
) -> None:
    shutil.copytree(voc, tmp_path / "voc")
    path = tmp_path / "voc/VOCdevkit/VOC2007/ImageSets/Main" / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=expected):
        open_multi_label(str(tmp_path / "voc"))


def test_a_missing_image_and_a_rare_class_are_named(voc: Path, tmp_path: Path) -> None:
    root = tmp_path / "voc/VOCdevkit/VOC2007"
    shutil.copytree(voc, tmp_path / "voc")
    (root / "JPEGImages" / "test0001.png").unlink()
    with pytest.raises(DataError, match="1 of 48 images of the test part are not in JPEGImages"):
        open_multi_label(str(tmp_path / "voc"))
    shutil.copy(root / "JPEGImages" / "test0000.png", root / "JPEGImages" / "test0001.png")
    lists = root / "ImageSets/Main/round_trainval.txt"
    lists.write_text(lists.read_text().replace("  1", " -1"))
    own = context_of(context(root / "JPEGImages", tmp_path), tmp_path / "voc")
    with pytest.raises(DataError, match="class round has 0 training images with or without it"):
        svm.run(own, OPTIONS)
