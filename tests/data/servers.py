"""Real servers on loopback, and a bad network in front of them."""

from __future__ import annotations

import re
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from moto.server import ThreadedMotoServer

HOST = "127.0.0.1"


class FileServer:
    """Serves a folder over HTTP/1.1 with byte ranges; can be restarted on its port.

    Attributes:
        ranges: whether ranges are honoured.
        failures: statuses that the next requests are answered with.
        requests: method, path and range of every request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranges, self.port = folder, True, 0
        self.failures: list[int] = []
        self.requests: list[tuple[str, str, str]] = []
        self._server: ThreadingHTTPServer | None = None
        self.start()

    def start(self) -> None:
        self._server = ThreadingHTTPServer((HOST, self.port), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str) -> int:
        return sum(request[0] == method for request in self.requests)


def _handler(owner: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

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
            data, info = path.read_bytes(), path.stat()
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
            if match and owner.ranges:
                start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
                data = data[start:stop]
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{info.st_size:x}-{info.st_mtime_ns:x}"')
            self.send_header("Last-Modified", self.date_time_string(int(info.st_mtime)))
            self.end_headers()
            if with_body:
                with suppress(ConnectionError):
                    self.wfile.write(data)

    return Handler


class S3Server:
    """moto's server; what it stores outlives a restart."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        self._server = ThreadedMotoServer(HOST, self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()
        self._server._server.server_close()


class BadNetwork:
    """A port that leads to a server: slowly, and only until the connection is cut off.

    Attributes:
        bytes_per_second: of every connection.
        cut_every: bytes, of all connections, after which the one that carries them breaks.
        sent: bytes that went through to clients.
        breaks: how often that happened.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port, self.port = server_port, 0
        self.bytes_per_second: float | None = None
        self.cut_every: int | None = None
        self.sent = self.breaks = self._since_cut = 0
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.start()

    def start(self) -> None:
        self._listener = socket.create_server((HOST, self.port), reuse_port=False)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Nobody listens any more, and connections break."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Breaks every connection."""
        for end in list(self._open):
            _reset(end)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection((HOST, self._server_port), timeout=5)
        except OSError:
            _reset(client)
            return
        self._open |= {client, server}
        up = threading.Thread(target=self._carry, args=(client, server, False), daemon=True)
        up.start()
        self._carry(server, client, True)
        for end in (client, server):
            _reset(end)
        up.join()
        self._open -= {client, server}

    def _carry(self, source: socket.socket, target: socket.socket, to_client: bool) -> None:
        with suppress(OSError):
            while data := source.recv(16 << 10):
                if not to_client:
                    target.sendall(data)
                    continue
                room = len(data)
                if self.cut_every is not None:
                    room = max(self.cut_every - self._since_cut, 0)
                target.sendall(data[:room])
                self.sent += min(room, len(data))
                self._since_cut += len(data)
                if self.cut_every is not None and room <= len(data):
                    self._since_cut = 0
                    self.breaks += 1
                    return
                if self.bytes_per_second:
                    time.sleep(len(data) / self.bytes_per_second)


def _reset(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
