"""This clock against those of a disk and of a server, whose Date is off."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from seer_scale.distributed.ports import free_port
from seer_scale.doctor.clock import check_clock


@pytest.fixture
def ahead() -> Iterator[str]:
    """The address of a server whose clock is two hours ahead, and which refuses everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(403)
            self.send_header("Date", formatdate(time.time() + 7200, usegmt=True))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_clock_two_hours_behind_a_server_is_said(ahead: str, tmp_path: Path) -> None:
    found = check_clock(tmp_path, [f"{ahead}/shard.tar?secret=1"], 5.0)
    assert found.status == "warn"
    seconds, _, rest = found.value.partition(" s ")
    assert abs(int(seconds) - 7200) <= 5
    assert rest == f"behind {ahead}"
    assert "signed requests" in found.meaning


def test_the_disk_s_clock_is_this_machine_s_and_silent_servers_are_left_out(
    tmp_path: Path,
) -> None:
    found = check_clock(tmp_path / "run", [f"http://127.0.0.1:{free_port()}"], 1.0)
    assert found.status == "ok"
    assert str(tmp_path) in found.value
    assert list(tmp_path.iterdir()) == []
