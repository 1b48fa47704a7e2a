"""Exports, evaluations and features killed with -9 in the middle of writing, and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import seer_scale
from harness.jobs import ROOT, write_images
from seer_scale.commands import convert
from seer_scale.errors import UserError
from tests.convert.weights import write_source

pytestmark = [pytest.mark.launch, pytest.mark.long]

TRUNK = "regnety_debug"
FOR_GOOD = ("replace", "unlink", "fsync")


def killed_at(last: int, work: Callable[[], object]) -> bool:
    """Whether a process was killed before its `last` call that puts names or bytes on the disk."""
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0
    calls = 0

    def counted(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **more: object) -> object:
            nonlocal calls
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return real(*args, **more)

        return call

    status = 1
    try:
        torch.set_num_threads(1)
        for name in FOR_GOOD:
            setattr(os, name, counted(name))
        work()
        status = 0
    finally:
        os._exit(status)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("to", ["huggingface", "safetensors"])
def test_an_export_killed_anywhere_is_the_old_one_the_new_one_or_none(
    tmp_path: Path, to: str
) -> None:
    sources, whole = [], []
    for seed in (0, 1):
        sources.append(str(tmp_path / f"{seed}.safetensors"))
        write_source(TRUNK, Path(sources[-1]), seed)
        convert.main([sources[-1], "--to", to, "--out", str(tmp_path / f"whole{seed}")])
        whole.append(files_of(tmp_path / f"whole{seed}"))
    out = tmp_path / "out"

    def export() -> None:
        convert.main([sources[1], "--to", to, "--out", str(out)])

    last, found = 0, set()
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "whole0", out)
        alive = not killed_at(last, export)
        files = files_of(out)
        assert files.items() <= whole[0].items() or files.items() <= whole[1].items()
        if files in whole:
            seer_scale.load(out)
            found.add(whole.index(files))
        else:
            with pytest.raises(UserError, match="holds no trunk"):
                seer_scale.load(out)
        if alive:
            break
        last += 1
    assert last > 5
    assert found == {0, 1}
    assert not list(tmp_path.glob("*.writing"))


def files_of(folder: Path) -> dict[str, bytes]:
    """What an export consists of; its card is for people."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"}


@pytest.mark.timeout(900)
def test_an_onnx_export_killed_in_the_middle_leaves_nothing_that_is_taken_for_one(
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnxruntime")
    write_source(TRUNK, tmp_path / "source.safetensors")
    out = tmp_path / "export" / "trunk.onnx"
    command = [sys.executable, "-m", "seer_scale", "convert", str(tmp_path / "source.safetensors")]
    command += ["--to", "onnx", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    writing = out.with_name("trunk.onnx.writing")
    while not writing.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not out.exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert out.is_file()
    assert sorted(path.name for path in out.parent.iterdir()) == ["README.md", "trunk.onnx"]


def test_an_evaluation_killed_in_the_middle_gives_the_same_when_started_again(
    tmp_path: Path,
) -> None:
    for part, count in (("train", 600), ("val", 300)):
        write_images(tmp_path / "set" / part, count)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def command(out: str) -> list[str]:
        given = ["knn", "--model", f"random:{TRUNK}", "--data", str(tmp_path / "set")]
        given += ["--out", str(tmp_path / out), "--features", str(tmp_path / out / "features")]
        given += ["--mlflow-uri", "none", "size=32"]
        return [sys.executable, "-m", "seer_scale", "evaluate", *given]

    for blocks in (1, 3):
        process = subprocess.Popen(command("killed"), env=environment, stderr=subprocess.PIPE)
        while len(list((tmp_path / "killed").glob("features/*/block_*.npy"))) < blocks:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert not (tmp_path / "killed" / "knn.json").exists()
    found = []
    for out in ("killed", "whole"):
        subprocess.run(command(out), env=environment, check=True, capture_output=True)
        found.append(json.loads((tmp_path / out / "knn.json").read_text())["metrics"])
    assert found[0] == found[1]
