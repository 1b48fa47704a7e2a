"""A port of this machine for a launcher's rendezvous."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port that no other job on this machine listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
