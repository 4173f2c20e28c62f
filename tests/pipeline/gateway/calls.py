"""Calls of an ASGI application without a server, and of a server by plain bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.gateway.api_keys import ApiKeyStore, new_key
from pipeline.gateway.context import AsgiApp, AsgiMessage, AsgiScope, Receive, Send, context_of
from pipeline.settings import Settings
from pipeline.storage.client import RedisClient, redis_client
from pipeline.storage.keys import GatewayKeys


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> str:
        """Name of its problem's type."""
        assert self.headers["content-type"] == "application/problem+json"
        members = json.loads(self.body)
        assert members["status"] == self.status
        assert members["request_id"] == self.headers["x-request-id"]
        return str(members["type"].removeprefix("/problems/"))


async def call(
    app: AsgiApp,
    path: str = "/v1/scores",
    *,
    method: str = "POST",
    token: str | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (),
    messages: Sequence[AsgiMessage] = ({"type": "http.request", "body": b"{}"},),
    receive: Receive | None = None,
    address: str = "192.0.2.1",
) -> Answer:
    """Call an application with a request, and return its answer."""
    rest = iter(messages)

    async def given() -> AsgiMessage:
        return next(rest, {"type": "http.disconnect"})

    sent: list[AsgiMessage] = []

    async def send(message: AsgiMessage) -> None:
        sent.append(message)

    all_headers = [*headers]
    if token is not None:
        all_headers.append((b"authorization", f"Bearer {token}".encode()))
    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"account_id=secret-account",
        "headers": all_headers,
        "client": (address, 50_000),
    }
    await app(scope, receive or given, send)
    if not sent:
        return Answer(0, {}, b"")
    start, *parts = sent
    return Answer(
        start["status"],
        {name.decode(): value.decode() for name, value in start["headers"]},
        b"".join(part.get("body", b"") for part in parts),
    )


def body(content: bytes) -> list[AsgiMessage]:
    """Messages of a whole body."""
    return [{"type": "http.request", "body": content}]


async def echo(scope: AsgiScope, receive: Receive, send: Send) -> None:
    """Serve the principal's name and the body; needs the scope ``score``."""
    name = context_of(scope).require("score").name
    message = await receive()
    start = {"type": "http.response.start", "status": 200, "headers": []}
    await send(start)
    await send({"type": "http.response.body", "body": name.encode() + message["body"]})


@asynccontextmanager
async def key_store(settings: Settings) -> AsyncIterator[tuple[RedisClient, ApiKeyStore]]:
    """Open a client of the settings' Redis and the keys in it."""
    client = RedisClient(redis_client(settings))
    try:
        yield client, ApiKeyStore(client, GatewayKeys(settings.redis_key_prefix))
    finally:
        await client.close()


async def add_key(store: ApiKeyStore, *scopes: str, **options: Any) -> tuple[str, str]:
    """Add a key; return its id and its token."""
    key, token = new_key("till", scopes or ("score",), **options)
    await store.add(key)
    return key.id, token


async def exchange(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send parts with pauses, and read until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        return await asyncio.wait_for(reader.read(), 30)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def request(token: str, content: bytes, length: int | None = None, close: bool = True) -> bytes:
    """Make the bytes of a score's request; its length may be a lie."""
    length = len(content) if length is None else length
    head = f"POST /v1/scores HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    head += f"Content-Length: {length}\r\n" + ("Connection: close\r\n" if close else "")
    return head.encode() + b"\r\n" + content
