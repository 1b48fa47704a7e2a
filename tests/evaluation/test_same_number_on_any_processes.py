"""Every task on frozen features gives the same number under 1, 2 and 4 processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.contexts import run_task

OPTIONS: dict[str, dict[str, Any]] = {
    "knn": {"size": 32, "k": [5, 20], "temperature": [0.07, 0.5]},
    "linear": {"size": 32, "epochs": 1, "batch": 160, "base_lr": [0.1]},
    "lowshot": {"size": 32, "fractions": [0.1], "per_class": [3]},
    "svm": {"size": 32, "costs": [1.0]},
    "retrieval": {"size": 32, "map": "gem"},
}


@pytest.mark.long
@pytest.mark.parametrize("task", OPTIONS)
def test_one_two_and_four_processes_agree(
    distributed: Callable[..., list[Any]], shapes: Path, tmp_path: Path, task: str
) -> None:
    found = {}
    for world_size in (1, 2, 4):
        folder = str(tmp_path / str(world_size))
        results = distributed(run_task, world_size, task, str(shapes), folder, OPTIONS[task])
        assert all(result.metrics == results[0].metrics for result in results)
        found[world_size] = (results[0].metrics, results[0].details)
    assert found[1] == found[2] == found[4]
    images = found[1][1].get("images", {"val": found[1][1].get("queries")})
    assert images["val"] == 300  # not padded to a multiple of the ranks
