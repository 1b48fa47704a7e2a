"""When a point of a study is finished: trained to its last step, and judged by every task."""

from __future__ import annotations

from pathlib import Path

from seer_scale.studies.run import evaluation_file, is_finished, is_trained, missing_evaluations
from tests.studies.test_study import points


def test_a_point_is_finished_once_every_task_has_judged_its_last_step(tmp_path: Path) -> None:
    tasks: dict[str, dict[str, int]] = {"knn": {}, "linear": {}}
    study, found = points(tmp_path, evaluate={"data": "images", "tasks": tasks})
    root, point = tmp_path / "out", found[0]
    saved = point.folder / "checkpoints"
    (saved / f"step_{point.steps - 1:08d}").mkdir(parents=True)
    assert not is_trained(point)
    (saved / f"step_{point.steps:08d}").mkdir()
    assert is_trained(point)
    assert not is_finished(study, root, point)
    for left in (["linear"], []):
        task = next(name for name in tasks if name in missing_evaluations(study, root, point))
        file = evaluation_file(root, point, task)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
        assert missing_evaluations(study, root, point) == left
        assert is_finished(study, root, point) == (not left)


def test_without_tasks_a_trained_point_is_finished(tmp_path: Path) -> None:
    study, found = points(tmp_path)
    (found[0].folder / "checkpoints" / f"step_{found[0].steps:08d}").mkdir(parents=True)
    assert is_finished(study, tmp_path / "out", found[0])
    assert not is_finished(study, tmp_path / "out", found[1])
