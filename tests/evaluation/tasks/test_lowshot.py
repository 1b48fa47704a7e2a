"""Low-shot splits are nested, stratified and written; a given list is read, mistakes are named."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from seer_scale.errors import ConfigError, DataError
from seer_scale.evaluation.datasets.labelled import open_labelled
from seer_scale.evaluation.datasets.train_list import read_names
from seer_scale.evaluation.feature_store import stored_features
from seer_scale.evaluation.tasks import lowshot
from seer_scale.evaluation.tasks.lowshot import Options, splits, write_names
from tests.evaluation.contexts import context
from tests.evaluation.test_labelled import write_set


@pytest.mark.long
def test_splits_are_nested_and_keep_every_class(shapes: Path) -> None:
    data = open_labelled(str(shapes))
    options = Options(fractions=[0.01, 0.1, 1.0], per_class=[1, 3], seeds=[0, 1])
    found = {(name, seed): set(chosen.tolist()) for name, seed, chosen in splits(data, options)}
    assert len(found) == 10
    for seed in (0, 1):
        sets = [found[name, seed] for name in ("1pct", "1shot", "3shot", "10pct", "100pct")]
        assert all(small <= large for small, large in pairwise(sets))
        # 91 or 92 images a class
        assert [len(s) for s in sets] == [12, 12, 36, 12 * 9, 1100]
        for chosen in sets[:3]:
            counts = data.train.targets[sorted(chosen)].bincount(minlength=12)
            assert len(set(counts.tolist())) == 1
    assert found["3shot", 0] != found["3shot", 1]


def test_a_split_hangs_on_names_not_on_the_order(shapes: Path) -> None:
    data = open_labelled(str(shapes))
    turned = np.arange(len(data.train))[::-1].copy()
    other = type(data)(data.train.subset(turned), data.val, data.classes)
    (_, _, first), (_, _, second) = (splits(d, Options(fractions=[0.05]))[0] for d in (data, other))
    assert set(first.tolist()) == set(turned[second].tolist())


def test_the_classifier_is_scikit_learns_on_the_split(few_shapes: Path, tmp_path: Path) -> None:
    own = context(few_shapes, tmp_path)
    options = Options(fractions=[], per_class=[2, 6], size=32, weight_decay=0.3)
    result = lowshot.run(own, options)
    data = open_labelled(str(few_shapes))
    val = stored_features(own, data.val, size=32)["avgpool"].all().double().numpy()
    for name, _, chosen in splits(data, options):
        part = data.train.subset(chosen)
        train = stored_features(own, part, size=32)["avgpool"].all().double().numpy()
        scaler = StandardScaler().fit(train)
        model = LogisticRegression(C=1 / (0.3 * len(part)), max_iter=5000, tol=1e-8)
        model.fit(scaler.transform(train), part.targets)
        expected = model.score(scaler.transform(val), data.val.targets)
        assert result.metrics[f"top1_{name}"] == pytest.approx(expected, abs=1 / 48 + 1e-9)
    assert result.metrics["top1"] == result.metrics["top1_2shot"]


def test_a_split_is_written_and_read_back(few_shapes: Path, tmp_path: Path) -> None:
    own = context(few_shapes, tmp_path)
    result = lowshot.run(own, Options(fractions=[0.5], size=32))
    (row,) = result.details["splits"]
    path = tmp_path / row["list"]
    assert len(path.read_text().splitlines()) == row["images"] == 48
    again = lowshot.run(own, Options(train_list=str(path), size=32))
    assert again.metrics["top1"] == result.metrics["top1"]
    data = open_labelled(str(few_shapes))
    names = [Path(data.train.source.name(index)).name for index in (3, 40)]
    (tmp_path / "files.txt").write_text("\n".join(names))
    assert read_names(str(tmp_path / "files.txt"), data.train).tolist() == [3, 40]
    write_names(tmp_path / "two.txt", data.train, np.array([3, 40]))
    assert read_names(str(tmp_path / "two.txt"), data.train).tolist() == [3, 40]


def test_a_written_list_tells_images_of_nested_folders_apart(tmp_path: Path) -> None:
    """In Tiny-ImageNet's layout the last two names of a path do not tell the class."""
    data = open_labelled(str(write_set(tmp_path / "set", "{name}/images")))
    write_names(tmp_path / "two.txt", data.train, np.array([1, 5]))
    assert (tmp_path / "two.txt").read_text() == "n01/images/1.JPEG\nn02/images/1.JPEG\n"
    assert read_names(str(tmp_path / "two.txt"), data.train).tolist() == [1, 5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read"),
        ("\n", "is empty: it needs the name of one image per line"),
        ("disc/nothing.png\n", r"names 1 images that are not in the training part \(disc/nothing"),
    ],
)
def test_a_wrong_list_is_named(
    few_shapes: Path, tmp_path: Path, text: str | None, expected: str
) -> None:
    path = tmp_path / "list.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=expected):
        read_names(str(path), open_labelled(str(few_shapes)).train)


def test_shares_that_cannot_be_are_named(few_shapes: Path) -> None:
    data = open_labelled(str(few_shapes))
    with pytest.raises(ConfigError, match=r"fractions has 1\.5"):
        splits(data, Options(fractions=[1.5]))
    with pytest.raises(ConfigError, match="per_class has 0"):
        splits(data, Options(fractions=[], per_class=[0]))
    with pytest.raises(ConfigError, match="fractions and per_class are empty"):
        splits(data, Options(fractions=[]))
