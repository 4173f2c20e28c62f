"""Free ports of 127.0.0.1, each given to one process only."""

from __future__ import annotations

import atexit
import random
import socket

from pipeline.errors import ServiceError

HOST = "127.0.0.1"
PORTS = range(15_000, 22_000)
"""Range of the ports that are given out.

Redis Cluster's bus uses the ports 10,000 higher. Both ranges lie below the ports that systems use
for outgoing connections. Otherwise a client that tries to reconnect could get the port of a
stopped service, and the service could not start again.
"""

_reserved: dict[int, socket.socket] = {}


def free_port(also_offset: int = 0) -> int:
    """Choose a port of 127.0.0.1 that is free and that no other process was given.

    Args:
        also_offset: distance to a second, higher port that must be free as well.

    Raises:
        ServiceError: no port is free.
    """
    candidates = list(PORTS)
    random.SystemRandom().shuffle(candidates)  # parallel runs then choose other ports
    for port in candidates:
        if port not in _reserved and is_free(port) and is_free(port + also_offset):
            reservation = _reserve(port)
            if reservation is not None:
                _reserved[port] = reservation
                return port
    raise ServiceError(f"no port from {PORTS.start} to {PORTS.stop - 1} of {HOST} is free")


def _reserve(port: int) -> socket.socket | None:
    """Keep other processes from choosing the port until this process ends.

    The reservation is a UDP socket with the port's number, since no service uses UDP.

    Returns:
        The socket, or None if another process holds the port.
    """
    reservation = socket.socket(type=socket.SOCK_DGRAM)
    try:
        reservation.bind((HOST, port))
    except OSError:
        reservation.close()
        return None
    atexit.register(reservation.close)
    return reservation


def is_free(port: int) -> bool:
    """Whether nothing listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections may linger
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
