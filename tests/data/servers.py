"""Real servers on loopback, and a bad network in front of them."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

from moto.server import ThreadedMotoServer

from harness.file_server import HOST, FileServer

__all__ = ["BadNetwork", "FileServer", "S3Server"]


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
        assert self._listener is not None
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
