"""A proxy before a real HTTP server that loses replies: the server has done what was asked."""

from __future__ import annotations

import re
import threading
from collections import Counter
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOST = "127.0.0.1"
_IDS = re.compile(r"/(m-)?[0-9a-f]{32}")
_OF_THE_CONNECTION = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class LostReplies:
    """Forwards requests, and breaks the connection instead of passing on the first of a kind.

    Attributes:
        port: where it listens, on loopback.
        seen: number of requests of each kind: method and path without ids.

    Args:
        server_port: of the server, on loopback.
        spared: part of the paths whose replies all arrive.
    """

    def __init__(self, server_port: int, spared: str) -> None:
        self.server_port, self.spared = server_port, spared
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server((HOST, 0), _handler(self))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def loses(self, method: str, path: str) -> bool:
        kind = f"{method} {_IDS.sub('/ID', path.partition('?')[0])}"
        with self._lock:
            self.seen[kind] += 1
            return self.seen[kind] == 1 and self.spared not in path

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100  # a model is uploaded by many connections at once


def _handler(owner: LostReplies) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size + 2)[:-2])
            self.rfile.readline()
            return b"".join(parts)

        def forward(self) -> None:
            kept = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in _OF_THE_CONNECTION
            }
            server = HTTPConnection(HOST, owner.server_port, timeout=120)
            server.request(self.command, self.path, self.body(), kept)
            reply = server.getresponse()
            content = reply.read()
            server.close()
            self.close_connection = True
            if owner.loses(self.command, self.path):
                return
            self.send_response(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in _OF_THE_CONNECTION:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            # Else a client may send its next request before it notices, and loses two replies.
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = forward  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    return Handler
