"""A real file server on loopback, which counts what it is asked for and what it sends."""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HOST = "127.0.0.1"


class FileServer:
    """Serves a folder over HTTP/1.1 with byte ranges; can be restarted on its port.

    Attributes:
        ranges: whether ranges are honoured.
        failures: statuses that the next requests are answered with.
        requests: method, path and range of every request.
        sent: bytes of all bodies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranges, self.port = folder, True, 0
        self.failures: list[int] = []
        self.requests: list[tuple[str, str, str]] = []
        self.sent = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    def start(self) -> None:
        """Listens at its port, at any free one the first time."""
        self._server = ThreadingHTTPServer((HOST, self.port), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stops to listen."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str) -> int:
        """Returns the number of requests with this method."""
        return sum(request[0] == method for request in self.requests)


def _handler(owner: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else the body waits 40 ms for the header's receipt

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            asked = self.headers.get("Range", "")
            owner.requests.append((self.command, self.path, asked))
            path = owner.folder / unquote(urlsplit(self.path).path).lstrip("/")
            status = owner.failures.pop(0) if owner.failures else 200 if path.is_file() else 404
            if status != 200:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            info = path.stat()
            start, stop = 0, info.st_size
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
            if match and owner.ranges:
                start, stop = int(match[1]), min(int(match[2]) + 1, info.st_size)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{info.st_size}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("ETag", f'"{info.st_size:x}-{info.st_mtime_ns:x}"')
            self.send_header("Last-Modified", self.date_time_string(int(info.st_mtime)))
            self.end_headers()
            if with_body:
                owner.sent += stop - start
                with path.open("rb") as file, suppress(ConnectionError):
                    file.seek(start)
                    self.wfile.write(file.read(stop - start))

    return Handler
