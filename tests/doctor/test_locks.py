"""File systems with locks, without them and with NFS's rule, as processes see them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.jobs import ROOT
from harness.locks import environment_with
from seer_scale.doctor.locks import check_locks


@pytest.mark.parametrize(
    ("rule", "status"), [("", "ok"), ("nfs", "ok"), ("none", "warn"), ("unknown", "warn")]
)
def test_locks_are_known_by_taking_one(tmp_path: Path, rule: str, status: str) -> None:
    code = (
        "import sys; from pathlib import Path; from seer_scale.doctor.locks import check_locks\n"
        "print(check_locks(Path(sys.argv[1])).status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=ROOT,
        env=environment_with(rule, below=tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == status
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_is_a_failure() -> None:
    assert check_locks(Path("/proc/run")).status == "fail"
