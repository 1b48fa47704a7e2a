"""Runs that rewind to a checkpoint after a loss has jumped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from harness.jobs import arguments, lines, losses, run_job
from harness.pool import Distributed
from seer_scale.checkpoint import list_checkpoints
from seer_scale.checkpoint.manifest import read_manifest, write_manifest
from seer_scale.train.rewinds import Rewind, position_after
from seer_scale.train.spikes import WINDOW
from tests.train.runs import EVERY, STRATEGIES, disturbed


def resumed_behind(run_dir: Path, checkpoint: Path, position: int) -> None:
    """Copies a checkpoint and changes its position in the stream."""
    folder = run_dir / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, folder)
    content = read_manifest(folder)
    files = content.pop("files")
    content["state"]["samples_seen"] = position
    (folder / "manifest.json").unlink()
    write_manifest(folder, {k: v for k, v in content.items() if k != "format"}, files)


@pytest.mark.long
@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero3"))]
)
def test_a_rewind_is_a_run_resumed_behind_the_spike(
    distributed: Distributed, images: Path, tmp_path: Path, strategy: str
) -> None:
    run_dir, oracle, killed = tmp_path / "run", tmp_path / "oracle", tmp_path / "killed"
    common = ["checkpoint.every=2", "checkpoint.keep=99", *EVERY[2:], "train.steps=9"]
    common += STRATEGIES[strategy]
    argv = arguments(images, run_dir, *common, "train.on_spike=rewind")
    assert distributed(disturbed, 2, argv, 30.0, (6,), (0, 1), 4) == ["", ""]
    (rewind,) = lines(run_dir, "rewinds.jsonl")
    assert (rewind["step"], rewind["to_step"]) == (6, 4)
    assert (rewind["samples_seen"], rewind["goes_on_at"]) == (32, 48)
    assert rewind["loss"] > rewind["threshold"]
    middle = run_dir / "checkpoints" / "step_00000004"
    resumed_behind(oracle, middle, 48)
    argv = arguments(images, oracle, *common, "--resume", "auto")
    distributed(run_job, 2, argv)
    assert losses(run_dir)[4:] == losses(oracle)
    assert lines(run_dir, "samples.jsonl")[4:] == lines(oracle, "samples.jsonl")
    assert [line["samples_seen"] for line in lines(run_dir)][4:] == [56, 64, 72, 80, 88]
    # A run killed between the rewind and the next checkpoint also continues behind the spike.
    shutil.copytree(middle, killed / "checkpoints" / middle.name)
    shutil.copy(run_dir / "rewinds.jsonl", killed / "rewinds.jsonl")
    distributed(run_job, 2, arguments(images, killed, *common, "--resume", "auto"))
    assert losses(killed) == losses(oracle)


@pytest.mark.long
def test_rewinding_without_end_is_the_end(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    more = ("train.steps=9", "train.on_spike=rewind", "train.max_rewinds=2", "checkpoint.every=4")
    argv = arguments(images, run_dir, *more)
    # Calls 7 to 10 are steps 5 to 8 after the rewind to step 4; all calls from 11 on are step 9.
    said = distributed(disturbed, 1, argv, 30.0, (6, *range(11, 99)), (0,), 4)[0]
    assert "a spike above" in said
    assert "gone back to the checkpoint of step 8 2 times (train.max_rewinds=2)" in said
    rewinds = [(line["step"], line["to_step"]) for line in lines(run_dir, "rewinds.jsonl")]
    assert rewinds == [(6, 4), (9, 8), (9, 8)]
    saved = [path.name for path in list_checkpoints(run_dir / "checkpoints")]
    assert saved == ["step_00000004", "step_00000008"]


def test_a_damaged_record_of_rewinds_is_one_sentence(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rewinds.jsonl").write_text(json.dumps({"step": 3}) + "\n")
    argv = arguments(images, tmp_path / "run")
    (said,) = distributed(disturbed, 1, argv, 1.0, (), (), WINDOW)
    assert "rewinds.jsonl is damaged" in said


def test_a_second_rewind_to_a_checkpoint_goes_on_behind_the_second_spike() -> None:
    rewinds = [
        Rewind(step=11, loss=9.0, threshold=2.0, to_step=8, samples_seen=64, goes_on_at=88),
        Rewind(step=10, loss=9.0, threshold=2.0, to_step=8, samples_seen=64, goes_on_at=104),
        Rewind(step=14, loss=9.0, threshold=2.0, to_step=12, samples_seen=136, goes_on_at=152),
    ]
    assert position_after(rewinds, 8, 64) == 104
    assert position_after(rewinds, 12, 136) == 152
    # Another run's checkpoint of the same step, and a step that nothing went back to.
    assert position_after(rewinds, 8, 80) == 80
    assert position_after(rewinds, 16, 168) == 168
