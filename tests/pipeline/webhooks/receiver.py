"""A receiver of webhooks over a real socket, which answers as each test says."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.local.ports import HOST

NETWORK = "127.0.0.0/8"
HANG_SECONDS = 3600.0
SECRET = "whsec_bm8gc2VjcmV0IGF0IGFsbCwgaXQgaXMgb2YgdGhlIHRlc3Rz"


@dataclass(frozen=True)
class Received:
    """A request."""

    path: str
    headers: dict[str, str] = field(repr=False)
    body: bytes

    @property
    def message_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def transaction_id(self) -> str:
        return str(json.loads(self.body)["data"]["transaction_id"])


Answer = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


def status(code: int, *headers: str, body: str = "") -> Answer:
    """Answer with a status."""

    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {code} Text", f"Content-Length: {len(body)}", *headers, "", body]
        writer.write("\r\n".join(lines).encode())

    return answer


def raw(content: bytes) -> Answer:
    """Answer with these bytes, and close."""

    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(content)

    return answer


def hang() -> Answer:
    """Never answer, and keep the connection open until the client closes it."""

    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(HANG_SECONDS)

    return answer


def trickle(head: bytes, drop: bytes, pause_seconds: float) -> Answer:
    """Answer with a head, and then without end with drops."""

    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while not writer.is_closing():
            writer.write(drop)
            await writer.drain()
            await asyncio.sleep(pause_seconds)

    return answer


class Receiver:
    """A server with an answer for each path."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.answers: dict[str, Answer] = {}
        self.connections = 0
        self.port = 0
        self.scheme = "http"

    @asynccontextmanager
    async def running(self, context: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
        self.scheme = "http" if context is None else "https"
        server = await asyncio.start_server(self._serve, HOST, self.port, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    def url(self, path: str, host: str = HOST) -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def of(self, path: str) -> list[Received]:
        return [request for request in self.requests if request.path == path]

    def ids(self, path: str) -> list[str]:
        """Transaction ids in the order of the requests."""
        return [request.transaction_id for request in self.of(path)]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            _, path, _ = head[0].split(" ")
            pairs = (line.split(": ", 1) for line in head[1:] if line)
            headers = {name.lower(): value for name, value in pairs}
            body = await reader.readexactly(int(headers["content-length"]))
            request = Received(path, headers, body)
            self.requests.append(request)
            answer = asyncio.ensure_future(self.answers.get(path, status(204))(request, writer))
            end = asyncio.ensure_future(reader.read())
            await asyncio.wait((answer, end), return_when=asyncio.FIRST_COMPLETED)
            for task in (answer, end):
                task.cancel()
            await asyncio.gather(answer, end, return_exceptions=True)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client went away, as some tests want it
        finally:
            writer.close()


def endpoint_table(name: str, url: str, **fields: Any) -> str:
    """Write an endpoint of RECUR_WEBHOOKS_FILE; its receiver is on this machine."""
    row: Mapping[str, Any] = {
        "name": name, "url": url, "secrets": [SECRET], "allow_networks": [NETWORK], **fields,
    }  # fmt: skip
    lines = [f"{key} = {json.dumps(value)}" for key, value in row.items()]
    return "\n".join(["[[endpoints]]", *lines, ""])
