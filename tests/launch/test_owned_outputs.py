"""What a command writes belongs to it meanwhile: a second one is told so, and changes nothing."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, cast

import pytest

from harness.jobs import ROOT, write_images
from harness.owners import own_elsewhere
from seer_scale.checkpoint.consolidate import consolidate
from seer_scale.commands import convert, data
from seer_scale.errors import UserError
from seer_scale.storage.ownership import living_owner, owned
from seer_scale.studies.run import _wait_for_leftover
from seer_scale.studies.stopping import StopSignals
from tests.convert.weights import write_source


@pytest.mark.parametrize("kind", ["file", "folder", "checkpoint", "manifest"])
def test_what_another_process_writes_is_left_alone(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out" / {"file": "trunk.pth", "manifest": "m.jsonl"}.get(kind, "whole")
    out.parent.mkdir()
    writing = out.with_name(f"{out.name}.writing")
    writing.write_text("the other's")
    write_source("regnety_debug", tmp_path / "source.safetensors")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(write_images(tmp_path / "images", 1), "images")

    def command() -> None:
        source = str(tmp_path / "source.safetensors")
        match kind:
            case "file":
                convert.main([source, "--to", "torchvision", "--out", str(out)])
            case "folder":
                convert.main([source, "--to", "huggingface", "--out", str(out)])
            case "checkpoint":
                consolidate(cast(Any, None), out)
            case "manifest":
                data.main(["index", str(tmp_path / "a.tar"), "--out", str(out)])

    with own_elsewhere(out, beside=True) as other:
        with pytest.raises(UserError, match=rf"{out} is in use by process {other.pid} on "):
            command()
        other.kill()
    assert writing.read_text() == "the other's"
    assert not out.exists()
    if kind != "checkpoint":  # the other is dead
        writing.unlink()
        command()
        assert out.exists()
        assert not list(out.parent.glob(".*.owner"))


@pytest.mark.long
@pytest.mark.launch
def test_an_evaluation_leaves_the_folder_of_another_alone(tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    with own_elsewhere(out) as other:
        command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "knn", "--out", str(out)]
        command += ["--model", "random:regnety_debug", "--data", str(tmp_path)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"error: --out {out} is in use by process {other.pid} on ")
        other.kill()
    assert [path.name for path in out.iterdir()] == [".owner"]


@pytest.mark.long
def test_a_study_waits_for_another_start_and_for_runs_that_it_left_behind(tmp_path: Path) -> None:
    said: list[str] = []
    for leftover in (False, True):
        with own_elsewhere(tmp_path) as other:

            def say(text: str, other: subprocess.Popen[str] = other) -> None:
                said.append(text)
                other.kill()
                other.wait()

            if leftover:
                stop = StopSignals()
                _wait_for_leftover(tmp_path, stop, say)
                stop.close()
            else:
                with owned(tmp_path, "the study", wait=True, say=say):
                    pass
        assert f"in use by process {other.pid} on " in said[-1]
        assert said[-1].endswith("waiting until it ends")
        assert living_owner(tmp_path) is None
    assert len(said) == 2
