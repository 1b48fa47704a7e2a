"""Commands on a disk that is full, from a tmpfs of their own: one sentence, no traceback."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from harness.jobs import ROOT, arguments, write_images
from seer_scale.models import build_trunk
from seer_scale.serving import export_trunk
from seer_scale.storage import disk_refusal
from seer_scale.storage.disk_refusal import refusal, sentence
from tests.evaluation.patterns import write_patterns

DISK_KIB = 256
# A disk of its own for one command, filled up to some KiB; nothing of it is left afterwards.
ON_A_FULL_DISK = f"""
mount -t tmpfs -o size={DISK_KIB}k tmpfs "$DISK" || exit 99
head -c "$((({DISK_KIB} - $ROOM) * 1024))" /dev/zero > "$DISK/filler" || exit 99
exec "$@"
"""
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `run` has its disk; skips where nobody may mount one."""
    folder = tmp_path_factory.mktemp("disk")
    if shutil.which("unshare") is None or run(folder, "true").returncode == 99:
        pytest.skip("needs the right to mount a tmpfs in a namespace of its own")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 8)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trunk") / "debug"
    return export_trunk(build_trunk("regnety_debug"), folder, trunk="regnety_debug")


def run(disk: Path, *command: str, room: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command with a full disk at `disk`, but for `room` KiB."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    environment |= {"DISK": str(disk), "ROOM": str(room), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*UNSHARE, ON_A_FULL_DISK, "sh", *command],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=disk.parent, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def refused(disk: Path, *command: str, room: int = 0) -> str:
    """The sentence that a command of ours ends with; nothing else is said of it."""
    done = run(disk, sys.executable, "-m", "seer_scale", *command, room=room)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert os.strerror(errno.ENOSPC) in said
    assert str(disk) in said
    return said


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize(("room", "tracking"), [(0, "false"), (0, "true"), (8, "true")])
def test_a_run_that_starts_on_a_full_disk(
    disk: Path, images: Path, tmp_path: Path, room: int, tracking: str
) -> None:
    """With nothing left, and with enough for the first files of a run but not for all."""
    server = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    argv = arguments(images, disk / "run", f"tracking.enabled={tracking}", server)
    said = refused(disk, "pretrain", *argv, room=room)
    assert said.endswith(": make room there, or name another place")


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize(
    "command",
    [
        "evaluate knn --model random:regnety_debug --data PATTERNS size=32 k=3 --out DISK/out",
        "evaluate linear --model random:regnety_debug --data PATTERNS size=32 batch=4 --out DISK",
        "convert TRUNK --to safetensors --out DISK/out",
        "convert TRUNK --to vissl --out DISK/out.torch",
        "data inspect IMAGES --out DISK/crops.png",
        "data index SHARD --out DISK/shards.jsonl",
        "study --study launch/studies/demo.yaml --slurm DISK/study.sbatch",
        "register TRUNK --name tried --uri sqlite:///DISK/mlflow.db",
    ],
)
def test_a_command_that_writes_to_a_full_disk(
    disk: Path, images: Path, trunk: Path, tmp_path: Path, command: str
) -> None:
    places = {"TRUNK": trunk, "IMAGES": images, "DISK": disk}
    if "PATTERNS" in command:
        places["PATTERNS"] = write_patterns(tmp_path / "patterns", train=8, val=8)
    if "SHARD" in command:
        places["SHARD"] = tmp_path / "shard.tar"
        with tarfile.open(places["SHARD"], "w") as tar:
            tar.add(images, ".")
    for name, path in places.items():
        command = command.replace(name, str(path))
    refused(disk, *command.split())


def test_a_result_that_is_printed_to_a_full_disk(disk: Path) -> None:
    done = run(disk, "sh", "-c", f'{sys.executable} -m seer_scale completion bash > "$DISK/out"')
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "standard output cannot be used" in done.stderr


def test_what_is_no_refusal_keeps_its_traceback() -> None:
    assert refusal(ValueError("x")) is None
    assert refusal(FileNotFoundError(errno.ENOENT, "none", "x")) is None
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wrapped = RuntimeError("could not save")
    wrapped.__context__ = full  # met on the way, not the cause
    assert refusal(wrapped) is None
    wrapped.__cause__ = full
    assert refusal(wrapped) is full


def test_the_sentence_says_what_to_do_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(number: int, *words: str, name: str | None = None) -> str:
        return sentence(OSError(number, os.strerror(number), name), words)

    read_only = said(errno.EROFS, "run.dir=/x/y", name="/x/y/config.yaml")
    assert read_only.startswith("/x/y/config.yaml cannot be used (")
    assert "mounted for writing" in read_only
    assert "permissions" in said(errno.EACCES, name="/x")
    assert "ulimit" in said(errno.EFBIG)
    assert "quota" in said(errno.EDQUOT)
    # No word that is an address is taken for a path, and nothing is written to /proc.
    monkeypatch.setattr(disk_refusal, "HARDLY_ANY", 1 << 62)  # every disk is full
    words = ("--out", "/x/y", "run.dir=/z", "data.path=s3://x/a", "k=1", "-v", "a=/proc/b")
    expected = "--out /x/y, run.dir=/z, the current folder, the folder for temporary files"
    assert said(errno.ENOSPC, *words).startswith(expected)
