"""The parts of a labelled set by `--data`: folders whose names have commas and blanks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.jobs import write_images
from seer_scale.errors import DataError
from seer_scale.evaluation.datasets.labelled import open_labelled


def part(folder: Path, count: int) -> Path:
    return write_images(folder, count)


@pytest.mark.parametrize("name", ["birds, cats", "a,b,c", ",", "x,"])
def test_a_folder_whose_name_has_commas_is_that_folder(tmp_path: Path, name: str) -> None:
    part(tmp_path / name / "train", 4)
    part(tmp_path / name / "val", 2)
    opened = open_labelled(str(tmp_path / name))
    assert (len(opened.train), len(opened.val), len(opened.classes)) == (4, 2, 2)


@pytest.mark.parametrize(
    ("train", "val", "comma"),
    [
        ("a", "b", ","),
        ("a", "b", ", "),
        ("birds, cats", "b", ","),
        ("a,b", "c, d", ","),
        ("a", "b", " ,"),
    ],
)
def test_two_parts_are_found_whatever_their_names_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, val: str, comma: str
) -> None:
    monkeypatch.chdir(tmp_path)
    part(Path(train), 4)
    part(Path(val), 2)
    assert not os.path.exists(f"{train}{comma}{val}")
    opened = open_labelled(f"{train}{comma}{val}")
    assert (len(opened.train), len(opened.val)) == (4, 2)


def test_a_part_that_is_missing_is_named_as_it_was_given(tmp_path: Path) -> None:
    there = part(tmp_path / "train", 4)
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_labelled(f"{there},{tmp_path}/nowhere")
