from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from harness.jobs import ROOT
from seer_scale.storage.atomic import filled_folder, replaced_file, replaced_folder
from tests.storage.power_cut import watched

Way = Callable[[Path], AbstractContextManager[Path]]
WAYS: dict[str, Way] = {
    "file": replaced_file,
    "file, many writers": lambda path: replaced_file(path, writers=2),
    "filled folder": filled_folder,
    "replaced folder": replaced_folder,
}


def write(way: str, fresh: Path, text: str) -> None:
    (fresh if way.startswith("file") else fresh / "a.txt").write_text(text)


def read(way: str, path: Path) -> str:
    return (path if way.startswith("file") else path / "a.txt").read_text()


@pytest.mark.parametrize("way", WAYS)
def test_the_old_stands_until_the_new_is_whole(tmp_path: Path, way: str) -> None:
    path = tmp_path / "deep" / "out"
    for text in ("old", "new"):
        with WAYS[way](path) as fresh:
            write(way, fresh, text)
            assert not path.exists() if text == "old" else read(way, path) == "old"
        assert read(way, path) == text
    assert [found.name for found in path.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("way", WAYS)
def test_an_error_leaves_the_old_and_nothing_else(tmp_path: Path, way: str) -> None:
    path = tmp_path / "out"
    with WAYS[way](path) as fresh:
        write(way, fresh, "old")

    def fail() -> None:
        with WAYS[way](path) as fresh:
            write(way, fresh, "half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert read(way, path) == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["out"]


def test_other_files_stay_in_a_filled_folder_only(tmp_path: Path) -> None:
    for way in ("filled folder", "replaced folder"):
        (tmp_path / way).mkdir()
        (tmp_path / way / "mine.txt").write_text("mine")
        with WAYS[way](tmp_path / way) as fresh:
            write(way, fresh, "new")
    assert (tmp_path / "filled folder" / "mine.txt").exists()
    assert not (tmp_path / "replaced folder" / "mine.txt").exists()


@pytest.mark.parametrize("way", ["replaced_file", "filled_folder", "replaced_folder"])
def test_a_killed_writer_leaves_the_old_and_no_second_leftover(tmp_path: Path, way: str) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from seer_scale.storage import atomic
with atomic.{way}(Path(sys.argv[1])) as fresh:
    (fresh if "{way}" == "replaced_file" else fresh / "a.txt").write_text(sys.argv[2])
    if sys.argv[2] == "half":
        os.kill(os.getpid(), signal.SIGKILL)
"""
    path, name = tmp_path / "out", way.replace("_", " ").replace("replaced file", "file")
    statuses = [
        subprocess.run([sys.executable, "-c", code, path, text], cwd=ROOT).returncode
        for text in ("old", "half", "half")
    ]
    assert statuses == [0, -signal.SIGKILL, -signal.SIGKILL]
    assert read(name, path) == "old"
    assert len(list(tmp_path.iterdir())) == 2  # the next writer takes the leftover's name
    subprocess.run([sys.executable, "-c", code, path, "new"], cwd=ROOT, check=True)
    assert read(name, path) == "new"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("way", WAYS)
def test_the_content_is_on_the_disk_before_the_rename_and_the_name_after_it(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(monkeypatch) as lost:
        for text in ("old", "new"):
            with WAYS[way](tmp_path / "out") as fresh:
                write(way, fresh, text)
    assert lost == []
