"""A folder of images for whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.jobs import write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))
