"""The middlewares under uvicorn itself: slow clients on real connections."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn

from pipeline.gateway.protection import make_authenticator, make_limiter, protect
from pipeline.gateway.server_protocol import HeadLimitedProtocol
from pipeline.local.redis import Redis
from pipeline.settings import load_settings
from tests.pipeline.gateway.calls import add_key, echo, exchange, key_store, request


class Hurried(HeadLimitedProtocol):
    head_seconds = 0.5


@asynccontextmanager
async def server(redis_server: Redis) -> AsyncIterator[tuple[int, str]]:
    """Run a server; yield its port and a token."""
    settings = load_settings(
        redis_url=redis_server.url,
        redis_key_prefix=f"gw-{uuid.uuid4().hex[:8]}",
        gateway_body_timeout_seconds=0.5,
        gateway_max_body_bytes=2_000,
    )
    async with key_store(settings) as (client, store):
        _, token = await add_key(store)
        app = protect(
            echo, settings, make_authenticator(settings, client), make_limiter(settings, client)
        )
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app, http=Hurried, access_log=False, log_config=None, lifespan="off",
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        running = uvicorn.Server(config)
        task = asyncio.create_task(running.serve([listener]))
        try:
            yield listener.getsockname()[1], token
        finally:
            running.should_exit = True
            await task
            listener.close()


@pytest.mark.live
def test_slow_and_greedy_clients_end_and_others_are_served(redis_server: Redis) -> None:
    async def run() -> None:
        async with server(redis_server) as (port, token):
            whole = request(token, b"{}")
            silent, half, slow, large, nobody, twice, served = await asyncio.gather(
                exchange(port),
                exchange(port, b"POST /v1/scores HTTP/1.1\r\n", b"Host: x\r\n", pause=0.1),
                exchange(port, request(token, b"{", 100)),
                exchange(port, request(token, b"", 5_000)),
                exchange(port, request("x", b"", 100)),
                exchange(port, request(token, b"{}", close=False), b"POST /", pause=0.1),
                exchange(port, whole),
            )
            assert silent == half == b""
            assert slow.startswith(b"HTTP/1.1 408 ")
            assert b'"type":"/problems/slow-request"' in slow
            assert large.startswith(b"HTTP/1.1 413 ")
            assert nobody.startswith(b"HTTP/1.1 401 ")  # its body is not waited for
            assert twice.startswith(b"HTTP/1.1 200 ")  # and then the half head ends it
            assert served.startswith(b"HTTP/1.1 200 ")
            assert b"till{}" in served
            assert b"\r\nx-request-id: " in served

    asyncio.run(run())
