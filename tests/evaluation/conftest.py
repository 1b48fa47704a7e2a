"""A rendered set and contexts for the evaluation's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from seer_scale.evaluation.shapes import write_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five blocks of features to train on and two to be judged by."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", train=1100, val=300, size=40)


@pytest.fixture(scope="session")
def few_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set that takes no time."""
    return write_shapes(tmp_path_factory.mktemp("data") / "few", train=96, val=48, size=40)
