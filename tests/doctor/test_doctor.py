"""`seer-scale doctor` on this machine: real disk, processes, servers and limits."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from harness.jobs import ROOT
from harness.mounts import with_tmpfs
from seer_scale.distributed.ports import free_port
from seer_scale.doctor import Finding
from seer_scale.doctor.collectives import _measure, check_collectives
from seer_scale.doctor.extras import check_compilers
from seer_scale.doctor.finding import below
from seer_scale.doctor.gpus import check_driver
from seer_scale.doctor.host import check_host
from seer_scale.doctor.storage import check_storage
from seer_scale.doctor.tracking import check_mlflow
from seer_scale.doctor.versions import _package, check_versions
from seer_scale.performance.free_memory import free_memory
from seer_scale.performance.processor import BFLOAT16


def doctor(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "seer_scale", "doctor", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.launch
def test_everything_is_looked_at_and_explained(tmp_path: Path) -> None:
    done = doctor("--json", "--run-dir", str(tmp_path / "not" / "yet"))
    report = json.loads(done.stdout)
    found = {row["name"]: row for row in report["findings"]}
    expected = ["python", "torch", "deepspeed", "mlflow", "driver", "memory", "disk"]
    expected += ["shared memory", "open files", "mlflow server", "apex amp", "fairscale"]
    assert set(expected) <= set(found)
    (together,) = (row for name, row in found.items() if name.endswith("all-reduce"))
    assert "GB/s per rank" in together["value"] or together["value"] == "1 rank"
    for row in report["findings"]:
        assert row["value"], row
        assert row["meaning"], row
        assert row["status"] == "ok" or row["advice"], row
    assert done.returncode == (1 if report["counts"]["fail"] else 0)
    assert sum(report["counts"].values()) == len(report["findings"])
    assert not (tmp_path / "not").exists()


def test_the_health_check_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys, time; from seer_scale.commands.doctor import main\n"
        "status = main(['--quick'])\n"
        "print(status, 'torch' in sys.modules, time.process_time() < 5)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 False True"


def test_a_failure_is_an_exit_status(tmp_path: Path) -> None:
    """A limit that no run would survive, set for this process alone."""
    code = (
        "import resource, sys; from seer_scale.commands.doctor import main\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); sys.exit(main(['--quick']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "fail  open files       200 at most" in done.stdout
    assert "ulimit -n" in done.stdout


@pytest.mark.parametrize(
    ("requirement", "status"),
    [("numpy>=1", "ok"), ("numpy>=1000", "fail"), ("no-such-package-here", "fail")],
)
def test_a_package_is_held_against_its_range(requirement: str, status: str) -> None:
    from packaging.requirements import Requirement

    assert _package(Requirement(requirement)).status == status
    assert {found.status for found in check_versions()} == {"ok"}


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    (found,) = check_storage(tmp_path / "runs", 8 << 20)
    assert found.status in ("ok", "warn")
    assert "GB/s written" in found.value
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_or_rights_fails(tmp_path: Path) -> None:
    (found,) = check_storage(tmp_path, 1 << 60)
    assert found.status == "fail"
    assert "GiB free" in found.value
    (found,) = check_storage(Path("/proc/runs"), 8 << 20)
    assert found.status == "fail"
    assert "run.dir" in found.advice


@pytest.fixture
def refusing() -> Iterator[str]:
    """The address of a server that wants a password, which is `right`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.headers.get("Authorization") == "Basic dXNlcjpyaWdodA=="
            self.send_response(200 if good else 401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def mlflow(uri: str) -> Finding:
    (found,) = check_mlflow(uri, 1.0)
    return found


def test_credentials_are_used_and_not_shown(refusing: str) -> None:
    wrong, right = mlflow(f"http://user:wrong@{refusing}"), mlflow(f"http://user:right@{refusing}")
    assert (wrong.status, right.status) == ("warn", "ok")
    assert "answers 401" in wrong.value
    assert "MLFLOW_TRACKING_PASSWORD" in wrong.advice
    assert not any("wrong" in text or "right@" in text for text in (wrong.value, right.value))


def test_a_port_that_nobody_listens_on_is_said() -> None:
    found = mlflow(f"http://127.0.0.1:{free_port()}")
    assert found.status == "warn"
    assert "refused" in found.value
    assert "sync" in found.meaning


def test_a_server_that_never_answers_costs_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        found = mlflow(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - began < 10
    assert found.status == "warn"
    assert "within 1 s" in found.value


def test_a_folder_is_no_mlflow() -> None:
    assert mlflow("file:///tmp/mlruns").status == "fail"


def test_ranks_that_cannot_answer_are_a_failure() -> None:
    (found,) = check_collectives(timeout=0.01)
    assert found.status == "fail"
    assert "did not answer" in found.value


def test_a_rank_that_raises_is_named_with_its_error() -> None:
    seconds, problem = _measure("no-such-backend", 1, 200.0)
    assert seconds is None
    assert problem is not None
    assert problem.startswith("rank 0: ")
    assert "no-such-backend" in problem.lower()


def test_memory_and_limits_are_those_of_this_process() -> None:
    found = {one.name: one for one in check_host()}
    assert f"{free_memory() / 2**30:.0f}".isdecimal()
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert found["open files"].value.startswith(str(soft))
    assert "/dev/shm" in found["shared memory"].value
    there = set(BFLOAT16) & set(Path("/proc/cpuinfo").read_text().split())
    assert found["bfloat16"].value.startswith("the processor multiplies it" if there else "no ")


def test_a_small_dev_shm_is_a_warning_and_no_failure() -> None:
    """A real mount of a container's size: the loader does without, NCCL may not."""
    command = with_tmpfs("/dev/shm", "64m")
    code = "from seer_scale.doctor.host import check_host; print(check_host()[1])"
    done = subprocess.run(
        [*command, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "status='warn', value='0.06 GiB in /dev/shm'" in done.stdout
    assert "--shm-size=16g" in done.stdout


def test_compilers_that_are_not_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    compiler, nvcc = check_compilers("13.0")
    assert (compiler.status, nvcc.status) == ("warn", "warn")
    assert check_driver()[0].status == "warn"


def test_a_driver_is_read_off_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the program, which needs a GPU; its line is as the real one prints it."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 580.65.06'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (found,) = check_driver()
    assert found.status == "ok"
    assert found.value == "580.65.06: 1 x [NVIDIA H100 80GB HBM3 80 GiB]"


def test_thresholds() -> None:
    assert [below(value, fail=1, warn=4) for value in (0.5, 1, 3.9, 4)] == [
        *("fail", "warn", "warn", "ok")
    ]
