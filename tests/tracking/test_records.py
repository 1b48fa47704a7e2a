"""A run's files: whole lines, resumed without doubles, a curve that opens."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seer_scale.data import BadSample
from seer_scale.tracking.records import Records, draw_curve, read_lines


def metrics(step: int) -> dict[str, float]:
    return {
        "loss": 3.0 / step,
        "lr": 0.1,
        "images_per_second": 20.0,
        "loss_over_ln_k": 0.9,
        "embedding_std": 0.1,
    }


def write(run_dir: Path, first_step: int, last_step: int, *, log_samples: bool = True) -> None:
    with Records(run_dir, first_step=first_step, log_samples=log_samples) as records:
        for step in range(first_step + 1, last_step + 1):
            records.metrics(step, metrics(step))
            records.samples(step, [step, step + 100])
            bad = [BadSample(f"{step}.jpg", "truncated"), BadSample(f"{step}.png", "zero bytes")]
            records.bad_samples(step, bad if step % 2 else [])


def test_one_object_per_step(tmp_path: Path) -> None:
    write(tmp_path / "new" / "run", 0, 3)
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": s, **metrics(s)} for s in (1, 2, 3)]
    assert read_lines(tmp_path / "new" / "run" / "samples.jsonl") == [
        {"step": step, "samples": [step, step + 100]} for step in (1, 2, 3)
    ]
    assert read_lines(tmp_path / "new" / "run" / "bad_samples.jsonl") == [
        {"step": step, "name": f"{step}.{suffix}", "cause": cause}
        for step in (1, 3)
        for suffix, cause in (("jpg", "truncated"), ("png", "zero bytes"))
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    records = Records(tmp_path, first_step=0, log_samples=True)
    records.metrics(1, metrics(1))
    records.samples(1, [4])
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
    assert len(read_lines(tmp_path / "samples.jsonl")) == 1
    records.close()


def test_samples_are_kept_only_if_asked_for(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, log_samples=False)
    assert not (tmp_path / "samples.jsonl").exists()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


def test_resuming_drops_what_is_done_again(tmp_path: Path) -> None:
    write(tmp_path, 0, 5)
    write(tmp_path, 2, 4)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [entry["step"] for entry in read_lines(tmp_path / name)] == [1, 2, 3, 4]
    bad = [entry["step"] for entry in read_lines(tmp_path / "bad_samples.jsonl")]
    assert bad == [1, 1, 3, 3]
    assert not list(tmp_path.glob("*.rewritten"))


def test_a_fresh_start_in_an_old_folder_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    write(tmp_path, 0, 1)
    assert [entry["step"] for entry in read_lines(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 1.0'])
def test_a_torn_last_line_is_left_out_and_mended(tmp_path: Path, torn: str) -> None:
    write(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    assert [entry["step"] for entry in read_lines(path)] == [1, 2, 3]
    write(tmp_path, 3, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    write(tmp_path, 0, 4)
    with Image.open(tmp_path / "curve.png") as curve:
        curve.load()
        assert curve.format == "PNG"
        assert min(curve.size) > 500
        assert len(np.unique(np.array(curve))) > 10  # something is drawn


def test_a_curve_needs_no_metric_of_the_objective(tmp_path: Path) -> None:
    with Records(tmp_path, first_step=0, log_samples=False) as records:
        records.metrics(1, {"loss": 1.0, "lr": 0.1})
        records.metrics(2, {"loss": 1.0, "lr": 0.1, "images_per_second": 3.0})
    assert draw_curve(tmp_path) == tmp_path / "curve.png"


def test_the_training_does_not_wait_for_the_curve(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 steps, whose lines take 0.4 s to read; drawn once, by another process.

    That process finds this package wherever it starts, and no file of that folder in its place.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "matplotlib.py").write_text("raise ImportError")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    lines = "".join(json.dumps({"step": s, **metrics(s)}) + "\n" for s in range(1, 20_001))
    records = Records(tmp_path, first_step=0, log_samples=False)
    (tmp_path / "metrics.jsonl").write_text(lines)
    worked = time.thread_time()
    for _ in range(20):
        records.draw_curve()
    assert time.thread_time() - worked < 0.1
    assert not (tmp_path / "curve.png").exists()
    drawing = records._drawing
    assert drawing is not None
    assert drawing.wait(timeout=500) == 0
    with Image.open(tmp_path / "curve.png") as curve:
        curve.load()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "metrics.jsonl"]
    records.close()


def test_without_a_step_there_is_no_curve(tmp_path: Path) -> None:
    write(tmp_path, 0, 0)
    assert draw_curve(tmp_path) is None
    assert not (tmp_path / "curve.png").exists()
    assert read_lines(tmp_path / "missing.jsonl") == []


def test_a_disk_that_takes_nothing_costs_lines_not_the_run(tmp_path: Path) -> None:
    with Records(tmp_path, first_step=0, log_samples=True) as records:
        records.metrics(1, metrics(1))
        room = (tmp_path / "metrics.jsonl").stat().st_size + 10
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.warns(UserWarning, match="records of .* are lost: .*File too large"):
                records.metrics(2, metrics(2))
            for step in range(3, 200):  # said once, and more than any buffer holds
                records.metrics(step, metrics(step))
            records.bad_samples(3, [BadSample("x" * room, "truncated")])
            records.draw_curve()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        records.metrics(200, metrics(200))
    found = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert found[0] == 1
    assert found[-1] == 200
    assert found == sorted(set(found))
