"""How far a study is, read off files that a test wrote, against sums by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seer_scale.storage.ownership import owned
from seer_scale.studies.status import progress_of, seconds_left, status_table
from seer_scale.studies.study import Point, Study
from seer_scale.tracking.progress import duration
from tests.studies.test_study import points


def write_steps(point: Point, steps: int) -> None:
    """Steps of 9 s whose loss falls by a quarter from 10."""
    point.folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": s, "loss": 10 - s / 4, "step_time": 9.0} for s in range(1, steps + 1)]
    lines.append({"step": steps, "eval/knn_top1": 0.5})
    (point.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))


@pytest.fixture
def study(tmp_path: Path) -> tuple[Study, Path, list[Point]]:
    """A finished point, and others in every other state."""
    made, found = points(tmp_path, evaluate={"data": "images", "tasks": {"knn": {}}})
    root, first = tmp_path / "out", found[0]
    write_steps(first, first.steps)
    (first.folder / "checkpoints" / f"step_{first.steps:08d}").mkdir(parents=True)
    report = root / "evaluations" / first.name / "knn.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"metrics": {"top1": 0.25}, "seconds": 6.0}))
    return made, root, found


def test_state_time_loss_and_top1_of_a_point(study: tuple[Study, Path, list[Point]]) -> None:
    made, root, found = study
    first, second = found[:2]
    done = progress_of(made, root, first)
    assert (done.state, done.step, done.top1) == ("finished", first.steps, 0.25)
    assert done.seconds == 9 * first.steps + 6
    assert done.loss == pytest.approx(10 - first.steps / 4)  # fewer than 20 steps: of the last one
    assert done.words() == f"{duration(done.seconds)}, loss {done.loss:.4f}, top-1 25.00 %"
    assert progress_of(made, root, second).state == "to do"
    write_steps(second, 1)
    assert progress_of(made, root, second).state == "stopped"
    with owned(second.folder, "a run"):
        assert progress_of(made, root, second).state == "running"
    (second.folder / "checkpoints" / f"step_{second.steps:08d}").mkdir(parents=True)
    assert progress_of(made, root, second).state == "trained"


def test_what_is_left_is_the_plan_in_the_measured_tempo(
    study: tuple[Study, Path, list[Point]],
) -> None:
    made, root, found = study
    every = [progress_of(made, root, point) for point in found]
    planned = [100.0] + [300.0] * (len(found) - 1)
    # The first point took its seconds where the plan said 100.
    tempo = every[0].seconds / 100
    assert seconds_left(every, planned) == pytest.approx(300 * (len(found) - 1) * tempo)
    untouched = every[1:]
    assert seconds_left(untouched, planned[1:]) == pytest.approx(sum(planned[1:]))
    table = status_table(every, 3725.0)
    assert f"\n1 of {len(found)} points finished; ETA 1:02:05" in table
    assert table.splitlines()[1].split()[:3] == [
        found[0].name,
        "finished",
        f"{found[0].steps}/{found[0].steps}",
    ]
