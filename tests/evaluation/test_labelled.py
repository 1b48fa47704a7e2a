"""Classes of labelled folders: those of torchvision, however deep the images lie, and never one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from seer_scale.config.key_values import build_from_texts, split_key_values
from seer_scale.errors import DataError
from seer_scale.evaluation.datasets.labelled import open_labelled
from seer_scale.evaluation.options import OPTIONS
from seer_scale.evaluation.session import run_task
from tests.evaluation.patterns import context, write_patterns
from tests.evaluation.test_labels import TASKS


def write_set(root: Path, layout: str) -> Path:
    """Three classes of four images, at `layout` below train and val."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("n01", "n02", "n03"):
            for number in range(4):
                session = f"session{number % 2}"
                path = root / part / layout.format(name=name, session=session) / f"{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return root


@pytest.mark.parametrize("layout", ["{name}", "{name}/images", "{name}/{session}/raw"])
def test_classes_are_those_of_torchvision(tmp_path: Path, layout: str) -> None:
    root, said = write_set(tmp_path / "set", layout), list[str]()
    data = open_labelled(str(root), say=said.append)
    for part, name in ((data.train, "train"), (data.val, "val")):
        theirs = ImageFolder(str(root / name))
        assert data.classes == theirs.classes == ["n01", "n02", "n03"]
        mine = {part.source.name(i): int(part.targets[i]) for i in range(len(part))}
        assert mine == dict(theirs.samples)
    assert said == ["3 classes; 12 images to train, 12 to test"]


@pytest.mark.parametrize("name", TASKS)
def test_one_class_is_refused_by_every_task(tmp_path: Path, name: str) -> None:
    """Every image in one folder `images` scored 100 %."""
    data = write_set(tmp_path / "set", "images/{name}")
    task = name.partition(" ")[0]
    options = build_from_texts(OPTIONS[task], {}, split_key_values(TASKS[name]), where="")
    with pytest.raises(DataError, match=r"all images have the same class \(images\)"):
        run_task(task, context(tmp_path, data), options)


def test_sentences_name_the_key_that_was_typed(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    one = write_set(tmp_path / "one", "images/{name}")
    for option in ("--data ", "eval.data="):
        for path, also in ((tmp_path / "set", False), (one, True)):
            with pytest.raises(DataError) as caught:
                open_labelled(str(path), option=option)
            said = str(caught.value)
            assert said.startswith(f"{'' if also else option}{path}")
            # Only a command with the option --labels may advise it.
            assert ("--" in said) == (option == "--data ")


def test_what_is_left_out_of_a_labelled_set_is_said(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "set", train=8, val=4)
    shutil.copy(next((root / "train").rglob("*.png")), root / "train" / "bars" / ".hidden.png")
    said: list[str] = []
    open_labelled(str(root), say=said.append)
    assert said == [
        "4 classes; 8 images to train, 4 to test",
        "left out: 1 hidden files and folders (bars/.hidden.png)",
    ]
