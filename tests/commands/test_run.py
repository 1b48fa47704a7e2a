"""`seer-scale` as it is typed: what it answers at once, what it refuses, and from a wheel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from harness.jobs import ROOT, arguments, lines, write_images
from seer_scale import __version__
from seer_scale.commands.convert import FORMATS
from seer_scale.commands.run import COMMANDS

SEER_SCALE = [sys.executable, "-m", "seer_scale"]


def say(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SEER_SCALE, *words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def test_it_names_every_command_and_every_command_is_there() -> None:
    done = say("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    files = {path.stem for path in (ROOT / "seer_scale" / "commands").glob("*.py")}
    assert files - {"__init__", "run"} == set(COMMANDS)
    assert say().stdout == done.stdout
    assert say("--version").stdout == f"seer-scale {__version__}\n"


def test_launch_has_a_file_for_what_launchers_start() -> None:
    for name in ("pretrain", "evaluate"):
        text = (ROOT / "launch" / f"{name}.py").read_text()
        assert f'run("{name}", sys.argv[1:])' in text


def test_help_and_version_load_next_to_nothing() -> None:
    """Process time, so that a busy machine does not matter."""
    for words in ("['--help']", "['--version']"):
        code = (
            "import sys, time; from seer_scale.commands.run import main\n"
            f"sys.argv[1:] = {words}\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "loaded = [n for n in ('torch', 'pydantic', 'mlflow', 'numpy') if n in sys.modules]\n"
            "print(loaded, time.process_time() < 1)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[] True"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = say(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: seer-scale {command} ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["pretrian"],
            "error: pretrian is not a command: did you mean pretrain? the commands are ",
        ),
        (
            ["--local_rank=0", "pretrain"],
            "error: --local_rank=0 comes from the deepspeed launcher: add --no_local_rank to it",
        ),
        (["pretrain"], "error: no recipe is named: add --recipe NAME, one of debug, demo, "),
        (
            ["evaluate", "kn", "--model", "x", "--data", "y"],
            "error: kn is not a task: did you mean",
        ),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], expected: str) -> None:
    done = say(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(expected)
    assert len(done.stderr.splitlines()) == 1


def test_the_formats_of_convert_are_all_there() -> None:
    from seer_scale.convert import Format

    assert set(FORMATS) == set(get_args(Format))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as a wheel of this clone installs it, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"
    clone.mkdir()
    for name in ("seer_scale", "launch", "ds_configs", "setup.py", "pyproject.toml", "README.md"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(clone)], check=True)
    uv = Path(sys.executable).with_name("uv")
    build = ["build", "--wheel", "--no-build-isolation", "-q", "-o", str(folder), str(clone)]
    subprocess.run([uv, *build], check=True)
    (file,) = folder.glob("*.whl")
    install = ["pip", "install", "-q", "--no-deps", "--target", str(folder / "site"), str(file)]
    subprocess.run([uv, *install, "--python", sys.executable], check=True)
    return folder / "site"


@pytest.mark.long
@pytest.mark.launch
def test_a_wheel_brings_all_it_needs(wheel: Path, tmp_path: Path) -> None:
    """The console script, recipes, studies and DeepSpeed's configurations, far from any clone."""
    environment = {**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [str(wheel / "bin" / "seer-scale"), *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"seer-scale {__version__}\n"
    assert "seer_256gf" in run("pretrain", "--help")
    assert " points on " in run("study", "--study", "launch/studies/demo.yaml", "--dry-run")
    argv = arguments(write_images(tmp_path / "images", 8), tmp_path / "run", "train.steps=2")
    run("pretrain", *argv, "--deepspeed_config", "ds_configs/zero1.json")
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]


def test_help_comes_within_a_second() -> None:
    """Wall clock, the best of five, since other programs may be at work."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert say("--help").returncode == 0
        times.append(time.perf_counter() - began)
    assert min(times) < 1


@pytest.mark.parametrize("words", [("completion", "bash"), ("--help",)])
def test_a_reader_that_has_gone_is_no_traceback(words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*SEER_SCALE, *words], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
