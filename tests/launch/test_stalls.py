"""Whole runs that wait for something that never comes: they end when asked, and say why."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from harness.jobs import ROOT, arguments, lines, write_images
from seer_scale.distributed.ports import free_port
from seer_scale.train.stopping import TOGETHER_S

pytestmark = [pytest.mark.launch, pytest.mark.long]

SECONDS = 200  # that a run may take to get somewhere on a busy machine


class Run:
    """A run in one process, with its environment; killed with all its processes by `kill`."""

    def __init__(self, argv: list[str], folder: Path, **environment: str) -> None:
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "seer_scale", "pretrain", *argv],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.family: list[psutil.Process] = []

    def wait_for(self, something: Callable[[], object], seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not something():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def ended(self, seconds: float = SECONDS) -> int:
        return self.process.wait(timeout=seconds)

    def said(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for process in self.family:
            if process.is_running():
                process.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*more: str, data: Path | str | None = None, **environment: str) -> Run:
        path = data or write_images(tmp_path / "images")
        argv = arguments(path, tmp_path / "run", "data.workers=1", *more)
        runs.append(Run(argv, tmp_path, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("stall") / "stall.so"
    source = Path(__file__).with_name("stall.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True
    )
    return library


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def shards(folder: Path) -> Path:
    """A manifest of one shard."""
    images = sorted(write_images(folder / "images").rglob("*.jpg"))
    with tarfile.open(folder / "0.tar", "w") as tar:
        for image in images:
            tar.add(image, image.name)
    size = (folder / "0.tar").stat().st_size
    manifest = folder / "shards.jsonl"
    manifest.write_text(f'{{"url": "0.tar", "count": {len(images)}, "bytes": {size}}}\n')
    return manifest


def labelled(folder: Path) -> Path:
    for part in ("train", "val"):
        write_images(folder / part, 8)
    return folder


# What stalls: a part of a path, how it is opened, and the keys that make the run open it.
STALLS = {
    "loader": (".jpg", "r", []),
    "save": (".partial/rank_", "w", ["checkpoint.every=1"]),
    "evaluation": ("/trunk/", "r", ["checkpoint.every=1", "eval.every=1"]),
    "manifest": ("shards.jsonl", "r", ["data.refresh=every 1 steps"]),
}


@pytest.mark.parametrize("where", STALLS)
def test_two_signals_end_a_run_whatever_it_waits_for(
    where: str, start: Callable[..., Run], preload: Path, tmp_path: Path
) -> None:
    part, how, more = STALLS[where]
    on, mark = tmp_path / "on", tmp_path / "stalled"
    if where == "loader":
        on.touch()
    if where == "evaluation":
        more = [*more, f"eval.data={labelled(tmp_path / 'labelled')}"]
    run = start(
        *more,
        "train.steps=4000",
        data=shards(tmp_path) if where == "manifest" else None,
        LD_PRELOAD=str(preload),
        STALL_PART=part,
        STALL_FOR=how,
        STALL_ON=str(on),
        STALL_MARK=str(mark),
    )
    if where != "loader":
        run.wait_for((tmp_path / "run" / "metrics.jsonl").exists)
        on.touch()
    run.wait_for(mark.exists)
    run.process.send_signal(signal.SIGINT)
    time.sleep(TOGETHER_S + 1)
    assert run.process.poll() is None, run.said()
    run.process.send_signal(signal.SIGINT)
    assert run.ended(60) == 130, run.said()
    assert "SIGINT: the run finishes this step, saves and ends; a second signal" in run.said()
    assert "error: rank 0 was ended at once by a second signal (SIGINT)" in run.said()
    assert "Traceback" not in run.said()
    deadline = time.monotonic() + 30
    while not gone(run.family) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(run.family)


def test_ctrl_c_ends_an_evaluation_that_waits_for_an_image(preload: Path, tmp_path: Path) -> None:
    mark = tmp_path / "stalled"
    (tmp_path / "on").touch()
    command = [sys.executable, "-m", "seer_scale", "evaluate", "knn", "--mlflow-uri", "none"]
    command += ["--model", "random:regnety_debug", "--data", str(labelled(tmp_path / "set"))]
    stall = {"STALL_PART": ".jpg", "STALL_FOR": "r", "STALL_ON": str(tmp_path / "on")}
    evaluation = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "LD_PRELOAD": str(preload),
            "STALL_MARK": str(mark),
            **stall,
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not mark.exists():
            assert evaluation.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
        evaluation.send_signal(signal.SIGINT)
        _, said = evaluation.communicate(timeout=30)
    finally:
        evaluation.kill()
    assert evaluation.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said


def test_one_rank_that_waits_too_long_for_images_is_ended(
    start: Callable[..., Run], preload: Path, tmp_path: Path
) -> None:
    (tmp_path / "on").touch()
    run = start(
        "run.hang_minutes=0.05",
        LD_PRELOAD=str(preload),
        STALL_PART=".jpg",
        STALL_FOR="r",
        STALL_ON=str(tmp_path / "on"),
        STALL_MARK=str(tmp_path / "stalled"),
    )
    assert run.ended() == 76, run.said()
    assert "error: rank 0 has waited " in run.said()
    assert " s in step 1, waiting for images; this rank is at " in run.said()
    assert "Traceback" not in run.said()


def test_a_pipe_among_the_images_is_no_image(start: Callable[..., Run], tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    os.mkfifo(images / "class0" / "pipe.jpg")
    run = start("train.steps=8", "run.log_samples=true", data=images)  # all of 24 images
    assert run.ended() == 0, run.said()
    seen = [line["samples"] for line in lines(tmp_path / "run", "samples.jsonl")]
    assert {sample for step in seen for sample in step} == set(range(24))
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()


def test_a_loader_killed_for_memory_ends_the_run_in_a_sentence(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start("train.steps=4000")
    run.wait_for((tmp_path / "run" / "metrics.jsonl").exists)
    trainer = psutil.Process(run.process.pid)
    servers = [p for p in trainer.children() if "forkserver" in " ".join(p.cmdline())]
    (worker,) = [worker for server in servers for worker in server.children()]
    worker.kill()
    assert run.ended(60) == 1, run.said()
    (error,) = [line for line in run.said().splitlines() if line.startswith("error: ")]
    assert error.startswith("error: the process that loads images was ended by SIGKILL, which")
    assert "Traceback" not in run.said()


def test_loaders_larger_than_the_memory_are_refused_before_the_run(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start("data.prefetch=1000000000")
    assert run.ended() == 2, run.said()
    (error,) = run.said().splitlines()
    assert error.startswith("error: the loaders of this machine's 1 ranks would hold 45776")
    assert "lower data.prefetch=1000000000 or train.micro_batch_size=4" in error
    assert not (tmp_path / "run").exists()


def test_a_port_that_another_run_has_is_a_sentence(tmp_path: Path) -> None:
    """DeepSpeed's launcher gives every run of a machine the same one."""
    port = free_port()
    other = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    argv = arguments(write_images(tmp_path / "images"), tmp_path / "run")
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--quiet", "--num_gpus", "2"]
    done = subprocess.run(
        [*launcher, "--master_port", str(port), str(ROOT / "launch" / "pretrain.py"), *argv],
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert f"error: port {port} of this machine is in use, most likely by another" in done.stderr
    assert "--master_port PORT" in done.stderr
    assert "Traceback" not in done.stderr
    del other
