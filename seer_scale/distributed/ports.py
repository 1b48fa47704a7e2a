"""Free port of this machine, for the rendezvous of a launcher."""

from __future__ import annotations

import random
import socket

# Below the ports that Linux gives to outgoing connections (32768 and up), so that no connection
# takes the port between `free_port` and the launcher's listening, and above the usual services.
LOWEST, HIGHEST = 20000, 32767


def free_port() -> int:
    """Finds a port that no process on this machine listens at.

    Raises:
        OSError: if a thousand random ports of the range are taken.
    """
    for _ in range(1000):
        port = random.SystemRandom().randint(LOWEST, HIGHEST)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port from {LOWEST} to {HIGHEST} is free on this machine")
