"""Which weights a folder stands for: those of a run are its newest checkpoint's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import seer_scale
from harness.jobs import arguments, run_job, write_images
from harness.pool import Distributed
from seer_scale.checkpoint.manifest import read_manifest, write_manifest
from seer_scale.commands.checkpoint import main
from seer_scale.convert.locating import locate
from seer_scale.errors import CheckpointError


def trunk(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "trunk.safetensors").write_bytes(b"")
    return folder


def test_a_run_stands_for_its_newest_checkpoint_that_has_a_trunk(tmp_path: Path) -> None:
    for step in (8, 16, 24):
        trunk(tmp_path / "checkpoints" / f"step_{step:08d}" / "trunk")
    (tmp_path / "checkpoints" / "step_00000032").mkdir()  # of another format, without a trunk
    newest = tmp_path / "checkpoints" / "step_00000024"
    assert locate(tmp_path) == newest / "trunk"
    assert locate(newest) == newest / "trunk"
    assert locate(newest / "trunk") == newest / "trunk"


def drop_trunk(step: Path) -> None:
    """Makes a checkpoint of a run that had to end before its trunk was written."""
    content = read_manifest(step)
    files = {name: stamp for name, stamp in content.pop("files").items() if "trunk/" not in name}
    shutil.rmtree(step / "trunk")
    write_manifest(step, content, files)


def test_a_checkpoint_without_a_trunk_says_how_to_get_one(
    distributed: Distributed, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    images = write_images(tmp_path / "images")
    argv = arguments(images, run_dir, "train.steps=2", "checkpoint.every=1")
    distributed(run_job, 1, argv)
    older, newest = sorted((run_dir / "checkpoints").glob("step_*"))
    expected = seer_scale.load(newest).state_dict()
    drop_trunk(newest)
    sentence = f"{newest} has no trunk/.*`seer-scale checkpoint consolidate {newest}`"
    with pytest.raises(CheckpointError, match=sentence):
        locate(newest)
    with pytest.warns(UserWarning, match=f"{older}/trunk is taken, because {sentence}"):
        assert locate(run_dir) == older / "trunk"
    drop_trunk(older)
    with pytest.raises(CheckpointError, match=sentence):
        locate(run_dir)
    main(["consolidate", str(newest)])
    joined = seer_scale.load(newest.with_name(f"{newest.name}_consolidated")).state_dict()
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[name], expected[name]) for name in expected)
