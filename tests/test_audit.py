"""`make audit` with the real pip-audit: a database with a finding, without any, and none."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from harness.jobs import ROOT
from seer_scale.distributed.ports import free_port

SCRIPT = ROOT / ".ci" / "audit.py"
PACKAGE, VERSION = "filelock", "3.15.0"
FINDING = {
    "id": "TEST-2026-1",
    "details": "made up",
    "affected": [
        {
            "package": {"name": PACKAGE, "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99"}]}],
        }
    ],
}


@contextmanager
def database(answer: dict[str, Any]) -> Iterator[str]:
    """Address of a database in OSV's form that says the same of every package."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()


def audit(lock: Path, address: str) -> subprocess.CompletedProcess[str]:
    lock.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{'0' * 64}\n")
    source = {"PIP_AUDIT_VULNERABILITY_SERVICE": "osv", "PIP_AUDIT_OSV_URL": address}
    return subprocess.run(
        [sys.executable, SCRIPT, lock],
        env={**os.environ, **source},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_finding_fails_and_is_named(tmp_path: Path) -> None:
    with database({"vulns": [FINDING]}) as address:
        done = audit(tmp_path / "lock", address)
    assert done.returncode == 1, done.stderr
    assert done.stdout == f"{PACKAGE} {VERSION}: {FINDING['id']}, mended in 99\n"


def test_no_finding_passes(tmp_path: Path) -> None:
    with database({}) as address:
        done = audit(tmp_path / "lock", address)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 of 1 packages looked up, no known vulnerability\n"


def test_a_database_out_of_reach_is_one_sentence(tmp_path: Path) -> None:
    done = audit(tmp_path / "lock", f"http://127.0.0.1:{free_port()}/v1/query")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not audited: the database of vulnerabilities cannot be reached")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_a_lock_that_cannot_be_read_is_no_lack_of_a_database(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("not a lock ===\n")
    done = subprocess.run([sys.executable, SCRIPT, lock], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr


def test_packages_that_were_not_looked_up_are_not_called_safe() -> None:
    verdict = runpy.run_path(str(SCRIPT))["verdict"]
    skipped = {"name": "a", "skip_reason": "not found"}
    clean = {"name": "b", "version": "1", "vulns": []}
    bad = {"name": "c", "version": "2", "vulns": [{"id": "X-1", "fix_versions": []}]}
    text, status = verdict([skipped])
    assert text.startswith("not audited: ")
    assert status == 0
    assert verdict([skipped, clean]) == (
        "1 of 2 packages looked up, no known vulnerability; not in the database: a",
        0,
    )
    assert verdict([skipped, clean, bad]) == ("c 2: X-1, mended in no version", 1)


def test_the_workflow_runs_it() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["audit"]["steps"][-1]["run"] == "make audit"
    assert "\naudit: $(READY)" in (ROOT / "Makefile").read_text()
