"""Retrieval against a loop over all pairs, and CopyDays' layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from seer_scale.data.generate.shapes import SHAPES, render
from seer_scale.errors import DataError
from seer_scale.evaluation.feature_store import stored_features
from seer_scale.evaluation.tasks import retrieval
from tests.evaluation.contexts import context

OPTIONS = retrieval.Options(size=32)


@pytest.fixture(scope="module")
def copydays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight originals, two strong copies of each, and distractors."""
    root = tmp_path_factory.mktemp("copydays")
    names = sorted(SHAPES)
    for folder in ("original", "strong", "distractors"):
        (root / folder).mkdir()
    for number in range(8):
        pixels = render(names[number], np.random.default_rng(number), 64)
        image = Image.fromarray(pixels)
        image.save(root / "original" / f"20{number:02d}00.png")
        image.crop((8, 8, 60, 60)).save(root / "strong" / f"20{number:02d}01.png")
        blurred = image.filter(ImageFilter.GaussianBlur(1.5))
        blurred.save(root / "strong" / f"20{number:02d}02.png")
        other = render(names[-1], np.random.default_rng(50 + number), 64)
        Image.fromarray(other).save(root / "distractors" / f"20{number:02d}03.png")
    return root


def test_copydays_equals_a_loop_over_all_pairs(copydays: Path, tmp_path: Path) -> None:
    own = context(copydays / "original", tmp_path)
    from dataclasses import replace

    own = replace(own, data=str(copydays))
    result = retrieval.run(own, OPTIONS)
    data = retrieval.open_retrieval(str(copydays), OPTIONS)
    queries, database = (
        [
            vector.double().tolist()
            for part in parts
            for vector in stored_features(own, part, size=32)["avgpool"].all()
        ]
        for parts in (data.queries, data.database)
    )
    names = [f"{number}" for number in range(8) for _ in range(2)] + ["distractor"] * 8
    total = 0.0
    for number, query in enumerate(queries):
        ranked = sorted(
            zip(database, names, strict=True),
            key=lambda entry: (
                -float(
                    torch.nn.functional.cosine_similarity(
                        torch.tensor(query), torch.tensor(entry[0]), dim=0
                    )
                )
            ),
        )
        hits, precision = 0, 0.0
        for place, (_, name) in enumerate(ranked, start=1):
            if name == str(number):
                hits += 1
                precision += hits / place
        total += precision / 2
    assert result.metrics["map"] == pytest.approx(total / 8, abs=1e-9)
    assert result.metrics["map"] > 0.3  # by chance about 0.13
    assert result.details["distractors"] == 8
    assert (result.details["queries"], result.details["database"]) == (8, 24)


def test_images_of_a_class_look_for_each_other(few_shapes: Path, tmp_path: Path) -> None:
    for name in ("gem", "rmac"):
        options = retrieval.Options(size=32, map=name)
        result = retrieval.run(context(few_shapes, tmp_path), options)
        assert 1 / 12 < result.metrics["map"] < 1
        assert result.metrics["map_trapezoid"] == pytest.approx(result.metrics["map"], abs=0.05)


def test_originals_without_copies_and_missing_folders_are_named(
    copydays: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="has no folder jpeg"):
        retrieval.open_retrieval(str(copydays), retrieval.Options(copies="jpeg"))
    (tmp_path / "original").mkdir()
    (tmp_path / "strong").mkdir()
    image = Image.new("RGB", (40, 40))
    for name in ("original/200000.png", "original/200100.png", "strong/200001.png"):
        image.save(tmp_path / name)
    with pytest.raises(DataError, match=r"1 of 2 originals have no copy in strong.*with 2001"):
        retrieval.open_retrieval(str(tmp_path), OPTIONS)
