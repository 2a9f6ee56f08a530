"""Free loopback ports, chosen once and remembered.

All lie below the kernel's ephemeral range: a port inside it can be taken by any outgoing
connection while its service is down, even by a client that tries to reconnect to that very port.
"""

from __future__ import annotations

import random
import socket

HOST = "127.0.0.1"
GRPC_OFFSET = 10_000
"""SeaweedFS also listens on each of its ports plus this."""
_RANGE = range(15_000, 22_000)


def is_free(port: int) -> bool:
    """Whether port and port + GRPC_OFFSET can be listened on now."""
    return all(_can_listen(number) for number in (port, port + GRPC_OFFSET))


def choose(taken: set[int]) -> int:
    """A free port that is not in `taken`."""
    for port in random.sample(_RANGE, len(_RANGE)):
        if port not in taken and is_free(port):
            return port
    raise OSError(f"no free port in {_RANGE.start}-{_RANGE.stop} on {HOST}")


def _can_listen(port: int) -> bool:
    if not 0 < port <= 65535:
        return True  # no such port, so nothing to collide with
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
