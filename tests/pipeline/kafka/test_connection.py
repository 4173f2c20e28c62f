"""A connection to a broker: answers in pieces, late answers, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiokafka import conn
from aiokafka.errors import CorrelationIdError, KafkaConnectionError
from aiokafka.protocol.admin import ApiVersionRequest_v0

from pipeline.kafka.connection import INT32, Connection, Packable, Packed, Versions, _Answers

ECHO_KEY, ECHO_VERSION = 77, 3
VERSIONS_ANSWER = b"\0\0" + INT32.pack(1) + b"\0\x4d\0\0\0\x03"  # of the request that it knows

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Text:
    """An answer that is the rest of its bytes."""

    @classmethod
    def decode(cls, data: memoryview) -> bytes:
        return bytes(data)


class Echo(Packable):
    """A request that the test's broker answers with its body."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def pack(self, versions: Versions) -> Packed:
        assert versions == {ECHO_KEY: (0, 3)}
        return Packed(ECHO_KEY, ECHO_VERSION, self._body, Text)


async def read_request(reader: asyncio.StreamReader) -> tuple[int, int, bytes, bytes]:
    """Return a request's key, version, number and body."""
    (size,) = INT32.unpack(await reader.readexactly(4))
    data = await reader.readexactly(size)
    name = int.from_bytes(data[8:10], "big")
    assert data[10 : 10 + name] == b"recur"
    key, version = int.from_bytes(data[:2], "big"), int.from_bytes(data[2:4], "big")
    return key, version, data[4:8], data[10 + name :]


async def answer(writer: asyncio.StreamWriter, number: bytes, body: bytes, piece: int) -> None:
    data = INT32.pack(4 + len(body)) + number + body
    for at in range(0, len(data), piece):
        writer.write(data[at : at + piece])
        await writer.drain()
        await asyncio.sleep(0)


def run(
    serve: Serve, test: Callable[[Connection], Awaitable[None]], timeout_ms: int = 30_000
) -> None:
    """Run a test with a connection to a broker that serves requests after the first in this way."""
    served = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key, _, number, _ = await read_request(reader)
        assert key == ApiVersionRequest_v0.API_KEY
        await answer(writer, number, VERSIONS_ANSWER, 100)
        try:
            await serve(reader, writer)
        except asyncio.IncompleteReadError:
            pass  # the connection is closed
        finally:
            writer.close()
            served.set()

    async def go() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        made = await conn.create_conn(
            "127.0.0.1", port, client_id="recur", request_timeout_ms=timeout_ms
        )
        assert isinstance(made, Connection)
        try:
            await test(made)
        finally:
            closed = made.close()
            if closed is not None:
                await closed
            await served.wait()
            server.close()

    asyncio.run(go())


@pytest.mark.parametrize("piece", [1, 3, 4, 1_000])
def test_answers_may_come_in_any_pieces(piece: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            key, version, number, body = await read_request(reader)
            assert (key, version) == (ECHO_KEY, ECHO_VERSION)
            await answer(writer, number, body, piece)

    async def test(connection: Connection) -> None:
        sent = [b"", b"x", b"y" * 50]
        assert await asyncio.gather(*(connection.send(Echo(body)) for body in sent)) == sent

    run(serve, test)


@pytest.mark.parametrize("cut", range(1, 24))
def test_several_answers_at_once_are_told_apart(cut: int) -> None:
    answers = [b"one", b"", b"three"]
    data = b"".join(INT32.pack(len(one)) + one for one in answers)
    found: list[bytes] = []
    split = _Answers(found.append, lambda error: None)
    split.data_received(data[:cut])
    split.data_received(data[cut:])
    assert found == answers


def test_an_answer_that_does_not_come_in_time_is_a_timeout() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def test(connection: Connection) -> None:
        with pytest.raises(TimeoutError):
            await connection.send(Echo(b"x"))

    run(serve, test, timeout_ms=50)


def test_the_end_of_a_connection_fails_its_requests_and_is_noticed() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.close()

    async def test(connection: Connection) -> None:
        reasons: list[Any] = []
        connection._on_close_cb = lambda _, reason: reasons.append(reason)
        assert connection.connected()
        with pytest.raises(KafkaConnectionError):
            await connection.send(Echo(b"x"))
        assert not connection.connected()
        assert reasons == [conn.CloseReason.CONNECTION_BROKEN]
        with pytest.raises(KafkaConnectionError):
            await connection.send(Echo(b"x"))

    run(serve, test)


def test_an_answer_to_another_request_ends_the_connection() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, _, number, body = await read_request(reader)
        await answer(writer, INT32.pack(INT32.unpack(number)[0] + 1), body, 100)
        await reader.read()

    async def test(connection: Connection) -> None:
        with pytest.raises(CorrelationIdError):
            await connection.send(Echo(b"x"))
        assert not connection.connected()

    run(serve, test)
