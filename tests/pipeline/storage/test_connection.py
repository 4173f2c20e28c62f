"""Held connection: each call gets its own replies, whatever happens to calls and servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hiredis
import pytest
import redis.asyncio as redis_asyncio
import uvloop
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from pipeline.local.redis import Redis
from pipeline.settings import load_settings
from pipeline.storage.client import RedisClient, StoreUnavailableError, redis_client
from pipeline.storage.connection import LENGTHS_KEPT, LONG_COMMAND, HeldConnection, pack
from pipeline.storage.script import Script

TIMEOUT_SECONDS = 0.5
LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
COUNT = Script(b"return redis.call('INCR', KEYS[1]) -- of test_connection")


@asynccontextmanager
async def held(url: str, timeout_seconds: float = 30.0, **options: Any) -> AsyncIterator[Any]:
    client = redis_asyncio.Redis.from_url(
        url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        **options,
    )
    connection = HeldConnection(client)
    try:
        yield connection
    finally:
        await connection.close()
        await client.aclose()


Answer = Callable[[list[bytes]], bytes | None]
"""Reply of a server to a command; None closes the connection."""


@asynccontextmanager
async def answering(
    answer: Answer, piece_bytes: int = 1_000, pause_seconds: float = 0.0
) -> AsyncIterator[str]:
    """Serve replies of a test's own, in pieces with pauses; yield the address."""
    serving: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        try:
            await answer_all(reader, writer)
        finally:
            writer.close()

    async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = hiredis.Reader(notEnoughData=None)
        while data := await reader.read(65_536):
            parser.feed(data)
            while (command := parser.gets()) is not None:
                if command[0] == b"CLIENT":  # of the login
                    writer.write(b"+OK\r\n")
                    continue
                reply = answer(command)
                if reply is None:
                    return
                for start in range(0, len(reply), piece_bytes):
                    await asyncio.sleep(pause_seconds)
                    writer.write(reply[start : start + piece_bytes])

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"redis://{host}:{port}/0"
        await asyncio.gather(*serving)  # until it has noticed that the clients left


def run(test: Callable[[], Awaitable[None]], loop: Any = uvloop.new_event_loop) -> None:
    async def go() -> None:
        await asyncio.wait_for(test(), 60)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(go())


def echo(number: int) -> list[tuple[str, str]]:
    """Make a call with one to four commands, whose replies name the call."""
    return [("ECHO", f"{number}-{i}") for i in range(1 + number % 4)]


def echoed(number: int) -> list[bytes]:
    return [text.encode() for _, text in echo(number)]


@pytest.mark.live
@pytest.mark.parametrize("loop", LOOPS)
def test_calls_at_the_same_time_get_their_own_replies(redis_server: Redis, loop: Any) -> None:
    async def go() -> None:
        async with held(redis_server.url) as connection:
            found = await asyncio.gather(*(connection.run(echo(i)) for i in range(200)))
            assert found == [echoed(i) for i in range(200)]
            (clients,) = await connection.run([("CLIENT", "LIST", "ID", *await ids(connection))])
            assert clients.count(b"\n") == 1, "all went over one connection"

    async def ids(connection: HeldConnection) -> list[str]:
        replies = [await connection.run([("CLIENT", "ID")]) for _ in range(3)]
        return [str(number) for number in {reply[0] for reply in replies}]

    run(go, loop)


@pytest.mark.live
def test_a_cancelled_call_leaves_no_reply_for_the_next_one(redis_server: Redis) -> None:
    async def go() -> None:
        async with held(redis_server.url) as connection:
            for when in range(20):
                calls = [asyncio.ensure_future(connection.run(echo(i))) for i in range(8)]
                for _ in range(when % 5):
                    await asyncio.sleep(0)
                for call in calls[::2]:
                    call.cancel()
                found = await asyncio.gather(*calls, return_exceptions=True)
                assert found[1::2] == [echoed(i) for i in range(1, 8, 2)]
                assert await connection.run(echo(99)) == echoed(99)

    run(go)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("piece_bytes", [1, 3, 7])
def test_replies_may_come_in_pieces(loop: Any, piece_bytes: int) -> None:
    async def go() -> None:
        reply = b"*3\r\n$5\r\nab\r\nc\r\n$-1\r\n:7\r\n"
        async with (
            answering(lambda command: reply, piece_bytes) as url,
            held(url) as connection,
        ):
            found = await asyncio.gather(*(connection.run(echo(i)) for i in range(10)))
            assert found == [[[b"ab\r\nc", None, 7]] * len(echo(i)) for i in range(10)]

    run(go, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_silent_server_fails_all_calls_and_the_next_call_connects_again(loop: Any) -> None:
    silent = True

    def answer(command: list[bytes]) -> bytes:
        return b"" if silent else b"$%d\r\n%b\r\n" % (len(command[1]), command[1])

    async def go() -> None:
        nonlocal silent
        async with answering(answer) as url, held(url, TIMEOUT_SECONDS) as connection:
            calls = (connection.run(echo(i)) for i in range(3))
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(error) for error in found] == [RedisTimeoutError] * 3
            silent = False
            assert await connection.run(echo(3)) == echoed(3)

    run(go, loop)


def test_a_server_that_keeps_sending_may_take_longer_than_the_timeout() -> None:
    """The timeout is for silence: a reply of many megabytes on a slow line takes its time."""

    async def go() -> None:
        pause_seconds = TIMEOUT_SECONDS / 2
        async with (
            answering(lambda command: b"$5\r\nabcde\r\n", 2, pause_seconds) as url,
            held(url, TIMEOUT_SECONDS) as connection,
        ):
            assert await connection.run([("ECHO", "x")]) == [b"abcde"]

    run(go)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "bad",
    [None, b"?what", b"+one\r\n+two too many\r\n"],
    ids=["closed", "another protocol", "a reply too many"],
)
def test_after_a_broken_reply_the_next_call_connects_again(loop: Any, bad: bytes | None) -> None:
    answers: list[bytes | None] = [bad]

    async def go() -> None:
        async with (
            answering(lambda command: answers.pop() if answers else b"+fine\r\n") as url,
            held(url) as connection,
        ):
            found = await asyncio.gather(connection.run([("ECHO", "x")]), return_exceptions=True)
            assert found[0] == [b"one"] or isinstance(found[0], RedisError)
            await asyncio.sleep(0.05)  # the reply too many comes
            assert connection._replies.is_lost
            assert await connection.run([("ECHO", "x")] * 2) == [b"fine"] * 2

    run(go, loop)


@pytest.mark.live
@pytest.mark.parametrize("loop", LOOPS)
def test_a_killed_connection_is_opened_again(redis_server: Redis, loop: Any) -> None:
    async def go() -> None:
        async with held(redis_server.url) as connection:
            (number,) = await connection.run([("CLIENT", "ID")])
            waiting = asyncio.ensure_future(connection.run([("BLPOP", "test-nothing", "0")]))
            await asyncio.sleep(0.1)
            with redis_server.client() as client:
                client.client_kill_filter(_id=number)
            with pytest.raises(RedisConnectionError):
                await waiting
            assert await connection.run([("CLIENT", "ID")]) != [number]

    run(go, loop)


@pytest.mark.live
def test_a_call_cancelled_while_it_connects_does_not_stop_the_others(redis_server: Redis) -> None:
    async def go() -> None:
        for steps in range(12):
            async with held(redis_server.url) as connection:
                calls = [asyncio.ensure_future(connection.run(echo(i))) for i in range(3)]
                for _ in range(steps):
                    await asyncio.sleep(0)
                calls[0].cancel()
                assert await asyncio.gather(*calls[1:]) == [echoed(1), echoed(2)]

    run(go)


@pytest.mark.live
def test_the_login_is_that_of_the_address(tmp_path: Path) -> None:
    socket = tmp_path / "redis.sock"

    async def go() -> None:
        async with held(f"unix://{socket}?db=3&password=secret") as connection:
            assert await connection.run([("SET", "a", "1")]) == [b"OK"]
            (info,) = await connection.run([("CLIENT", "INFO")])
            assert b"db=3" in info
            assert b"resp=2" in info or b"resp=" not in info
        async with held(f"unix://{socket}?password=wrong") as connection:
            with pytest.raises(RedisError):
                await connection.run([("PING",)])

    with Redis(options={"unixsocket": str(socket)}) as server:
        with server.client() as admin:
            admin.config_set("requirepass", "secret")
        run(go)


# the client ------------------------------------------------------------------------------


def client_of(server: Redis) -> RedisClient:
    return RedisClient(redis_client(load_settings(redis_url=server.url)))


async def with_client(server: Redis, test: Callable[[RedisClient], Awaitable[None]]) -> None:
    client = client_of(server)
    try:
        await test(client)
    finally:
        await client.close()


@pytest.mark.live
def test_an_error_of_one_command_keeps_the_replies_of_others_apart(redis_server: Redis) -> None:
    async def go(client: RedisClient) -> None:
        await client.execute([("SET", "test-text", "x"), ("DEL", "test-n")])
        with pytest.raises(StoreUnavailableError, match="ResponseError"):
            await client.execute([("INCR", "test-text"), ("INCR", "test-n")])
        assert await client.execute([("GET", "test-n"), ("GET", "test-text")]) == [b"1", b"x"]

    run(lambda: with_client(redis_server, go))


@pytest.mark.live
def test_after_a_lost_script_only_its_own_commands_are_repeated(redis_server: Redis) -> None:
    async def go(client: RedisClient) -> None:
        await client.execute([("DEL", "test-calls", "test-others")])
        commands: Sequence[Any] = [
            COUNT.call([b"test-calls"]),
            ("INCR", "test-others"),
            COUNT.call([b"test-calls"]),
        ]
        for turn in range(1, 4):
            with redis_server.client() as other:
                other.script_flush()
            assert await client.execute(commands) == [2 * turn - 1, turn, 2 * turn]

    run(lambda: with_client(redis_server, go))


@pytest.mark.live
def test_a_server_that_refuses_scripts_is_named_with_its_reason(redis_server: Redis) -> None:
    async def go() -> None:
        def answer(command: list[bytes]) -> bytes:
            if command[0] == b"SCRIPT":
                return b"-ERR no scripts here\r\n"
            return b"-NOSCRIPT No matching script\r\n"

        async with answering(answer) as url:
            client = RedisClient(redis_client(load_settings(redis_url=url)))
            with pytest.raises(StoreUnavailableError, match="no scripts here"):
                await client.execute([COUNT.call([b"test-calls"])])
            await client.close()

    run(go)


def test_errors_have_the_classes_of_redis_py() -> None:
    replies = [b"-NOSCRIPT none\r\n", b"-WRONGTYPE another\r\n"]

    async def go() -> None:
        async with answering(lambda command: replies.pop(0)) as url, held(url) as connection:
            found = await connection.run([("GET", "a"), ("GET", "b")])
            assert [type(error) for error in found] == [NoScriptError, ResponseError]

    run(go)


@pytest.mark.live
def test_a_server_that_became_a_replica_is_left() -> None:
    """Sentinel, or the name in the address, may lead to another server now."""

    async def go(client: RedisClient) -> None:
        await client.execute([("SET", "a", "1")])
        client.client.connection_pool.connection_kwargs["port"] = second.port
        await client.execute([("SET", "a", "2")])
        with first.client() as admin:
            assert admin.get("a") == b"2", "the connection stays while it works"
            admin.replicaof("127.0.0.1", second.port)
        with pytest.raises(StoreUnavailableError):
            await client.execute([("SET", "a", "3")])
        await client.execute([("SET", "a", "4")])
        with second.client() as admin:
            assert admin.get("a") == b"4"

    with Redis() as first, Redis() as second:
        run(lambda: with_client(first, go))


@pytest.mark.parametrize("arguments", [1, LONG_COMMAND - 2, LONG_COMMAND - 1, 3 * LONG_COMMAND])
def test_a_command_of_any_length_is_packed_as_hiredis_does(arguments: int) -> None:
    values = [b"", b"\r\n", b"x" * LENGTHS_KEPT, b"y" * 70_000, b"\x00\xff"]
    command: tuple[str | bytes, ...] = "MGET", *[values[i % 5] for i in range(arguments)]

    assert pack(command) == hiredis.pack_command(command)  # type: ignore[arg-type]
