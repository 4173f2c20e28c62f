"""Commands that a Redis received, by the process that sent them."""

from __future__ import annotations

import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from pipeline.local.ports import HOST
from pipeline.local.redis import Redis

READ_SECONDS = 60.0
_LINE = re.compile(rb'\+[\d.]+ \[\d+ (?:\S*:)?(\w+)\] "([^"]*)"(.*)')


@dataclass(frozen=True)
class Command:
    """A command as MONITOR shows it.

    Attributes:
        port: of its sender; None inside of a script.
        name: in upper case.
        arguments: escaped text.
    """

    port: int | None
    name: str
    arguments: str


@contextmanager
def watched_commands(redis: Redis) -> Iterator[list[Command]]:
    """Collect the commands of all clients within the block; the list is whole after it."""
    found: list[Command] = []
    with socket.create_connection((HOST, redis.port), READ_SECONDS) as monitor:
        monitor.sendall(b"MONITOR\r\n")
        lines = monitor.makefile("rb")
        assert lines.readline() == b"+OK\r\n"
        yield found
        end = uuid.uuid4().hex
        with redis.client() as client:
            client.echo(end)
        for line in lines:
            if end.encode() in line:
                break
            match = _LINE.match(line)
            assert match is not None, line
            port = int(match[1]) if match[1].isdigit() else None
            found.append(Command(port, match[2].decode().upper(), match[3].decode("ascii")))


def ports_to(redis: Redis, pid: int) -> set[int]:
    """Return the ports from which a process speaks to a Redis."""
    return {
        connection.laddr.port
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.raddr and connection.raddr.port == redis.port
    }
