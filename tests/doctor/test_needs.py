"""What a run needs against what is here: real limits, disks and ports."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

from harness.jobs import ROOT
from harness.mounts import with_tmpfs
from seer_scale.distributed.ports import free_port
from seer_scale.doctor.needs import (
    check_disk,
    check_memory,
    check_nccl_memory,
    check_port,
)

GIB = 2**30


def test_memory_fits_fits_barely_or_does_not() -> None:
    parts = [("images", 1.0 * GIB), ("tensors", 2.0 * GIB)]
    found = [check_memory("memory", parts, free * GIB, "lower it") for free in (4, 3.1, 2.9)]
    assert [one.status for one in found] == ["ok", "warn", "fail"]
    assert found[2].value == "needs 3.00 GiB (images 1.00, tensors 2.00), 2.90 free"
    assert [one.advice for one in found] == ["", "lower it", "lower it"]


def test_a_disk_is_measured_where_the_folder_will_be(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    folder = tmp_path / "not" / "yet"

    def check(needed: float, present: float = 0.0) -> str:
        return check_disk("disk", folder, needed, present=present, advice="go on").status

    assert check(free / 2) == "ok"
    assert check(2 * free) == "fail"
    assert check(2 * free, present=1.5 * free) == "ok"
    assert not folder.parent.exists()


def test_a_small_disk_that_is_mounted_is_known_by_its_size(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from seer_scale.doctor.needs import check_disk\n"
        "for size in (3 << 20, 5 << 20):\n"
        "    print(check_disk('disk', Path(sys.argv[1]) / 'x', size, present=0, advice='!').status)"
    )
    done = subprocess.run(
        [*with_tmpfs(tmp_path, "4m"), sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["ok", "fail"], done.stderr


def test_open_files_are_counted_by_ranks_micro_batches_and_shards() -> None:
    """A limit for a process of its own: 256 for the program, 4 for a rank, 11 and 64."""
    code = (
        "import resource; from seer_scale.doctor.needs import check_open_files\n"
        "for limit in (339, 338):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 2000))\n"
        "    found = check_open_files(2, 11, 64); print(found.status, found.advice)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["ok ", "fail ulimit -n 2000 before the run"]


def test_a_port_that_another_process_listens_at_is_said() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        taken = check_port(port, ranks=2)
        assert taken.status == "fail"
        assert f"{port} is in use" in taken.value
        assert "--master_port" in taken.advice
        assert check_port(port, ranks=1).status == "ok"
    assert check_port(free_port(), ranks=2).status == "ok"


def test_shared_memory_matters_to_gpus_of_one_machine_only(tmp_path: Path) -> None:
    assert check_nccl_memory(8, cuda=False, folder=tmp_path / "none").status == "ok"
    assert check_nccl_memory(1, cuda=True, folder=tmp_path / "none").status == "ok"
    missing = check_nccl_memory(8, cuda=True, folder=tmp_path / "none")
    assert (missing.status, missing.value[:8]) == ("warn", "0.00 GiB")
