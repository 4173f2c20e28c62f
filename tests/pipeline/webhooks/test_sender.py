"""Attempts over real sockets, at receivers that fail, hang, redirect and lie."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks

from pipeline.local.ports import HOST, free_port
from pipeline.webhooks.endpoints import Endpoint, load_endpoints
from pipeline.webhooks.sender import HEADER_MAX_BYTES, Attempt, GetAddresses, Sender, get_addresses
from tests.fakes.secure_services import Authority
from tests.pipeline.webhooks.receiver import (
    SECRET,
    Answer,
    Received,
    Receiver,
    endpoint_table,
    hang,
    raw,
    status,
    trickle,
)

BODY = b'{"type":"webhook.test","data":{}}'
LONG_SECONDS = 30.0
SHORT_SECONDS = 0.6


def endpoint_of(folder: Path, url: str, **fields: Any) -> Endpoint:
    path = folder / "webhooks.toml"
    path.write_text(endpoint_table("cases", url, **fields))
    return load_endpoints(path)["cases"]


async def attempt(
    endpoint: Endpoint,
    *,
    lookup: GetAddresses = get_addresses,
    timeout_seconds: float = LONG_SECONDS,
) -> Attempt:
    sender = Sender(endpoint, timeout_seconds, lookup=lookup)
    try:
        return await sender.send("msg_1", BODY)
    finally:
        await sender.close()


def run(test: Callable[[Receiver], Coroutine[Any, Any, None]]) -> None:
    async def with_receiver() -> None:
        async with Receiver().running() as receiver:
            await test(receiver)

    asyncio.run(with_receiver())


def test_a_delivery_is_signed_and_json(tmp_path: Path) -> None:
    async def test(receiver: Receiver) -> None:
        endpoint = endpoint_of(tmp_path, receiver.url("/hook?team=a"))
        sent = await attempt(endpoint)

        assert (str(sent), sent.is_delivered) == ("delivered (status 204)", True)
        (request,) = receiver.requests
        assert request.path == "/hook?team=a"
        assert request.body == BODY
        assert request.headers["content-type"] == "application/json"
        standardwebhooks.Webhook(SECRET).verify(request.body, request.headers)

    run(test)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (status(200, body="x" * 100_000), "delivered (status 200)"),
        (status(204, "Content-Encoding: gzip"), "delivered (status 204)"),
        (status(301, "Location: /other"), "redirect (status 301)"),
        (status(307, "Location: http://169.254.169.254/"), "redirect (status 307)"),
        (status(400), "client_error (status 400)"),
        (status(401, "WWW-Authenticate: Basic"), "client_error (status 401)"),
        (status(410), "gone (status 410)"),
        (status(429), "slow_down (status 429)"),
        (status(500), "server_error (status 500)"),
        (status(502), "slow_down (status 502)"),
        (status(503), "slow_down (status 503)"),
        (status(504), "slow_down (status 504)"),
        (status(999), "other_status (status 999)"),
    ],
)
def test_the_status_alone_decides(tmp_path: Path, answer: Answer, expected: str) -> None:
    async def test(receiver: Receiver) -> None:
        receiver.answers["/hook"] = answer

        assert str(await attempt(endpoint_of(tmp_path, receiver.url("/hook")))) == expected
        assert len(receiver.requests) == 1  # no redirect is followed

    run(test)


LIES = {
    "no http": (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "protocol"),
    "nothing": (raw(b""), "connection"),
    "a head without an end": (raw(b"HTTP/1.1 200 OK\r\nServer: x"), "connection"),
    "a chunk without a valid size": (
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n"),
        "protocol",
    ),
    "a Content-Length that is not a number": (
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
        "protocol",
    ),
    "a header that is too long": (
        raw(b"HTTP/1.1 200 OK\r\nX: " + b"a" * (2 * HEADER_MAX_BYTES) + b"\r\n\r\n"),
        "protocol",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_an_answer_that_is_no_http_is_a_failure(tmp_path: Path, name: str) -> None:
    async def test(receiver: Receiver) -> None:
        receiver.answers["/hook"], expected = LIES[name]

        assert (await attempt(endpoint_of(tmp_path, receiver.url("/hook")))).result == expected

    run(test)


@pytest.mark.parametrize(
    "answer",
    [
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nshort"),
        raw(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nbomb"),
        trickle(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n", b"x" * 1000, 0.0),
        trickle(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n", b"x", 0.1),
    ],
    ids=["short", "no-gzip", "endless", "slow"],
)
def test_a_body_that_lies_changes_no_status(tmp_path: Path, answer: Answer) -> None:
    async def test(receiver: Receiver) -> None:
        receiver.answers["/hook"] = answer

        assert (await attempt(endpoint_of(tmp_path, receiver.url("/hook")))).is_delivered

    run(test)


@pytest.mark.parametrize(
    "answer",
    [
        hang(),
        trickle(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.1),
        trickle(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.1),
    ],
    ids=["silent", "headers", "hints"],
)
def test_the_limit_is_of_the_attempt_as_a_whole(tmp_path: Path, answer: Answer) -> None:
    """A receiver that sends a little all the time is over the limit, too."""

    async def test(receiver: Receiver) -> None:
        receiver.answers["/hook"] = answer
        endpoint = endpoint_of(tmp_path, receiver.url("/hook"))

        found = await attempt(endpoint, timeout_seconds=SHORT_SECONDS)

        assert found.result == "timeout"
        assert found.seconds >= SHORT_SECONDS

    run(test)


def test_a_name_server_that_hangs_is_over_the_limit(tmp_path: Path) -> None:
    release = threading.Event()

    def lookup(host: str, port: int) -> Sequence[tuple[Any, ...]]:
        release.wait(LONG_SECONDS)
        raise socket.gaierror("none")

    async def test(receiver: Receiver) -> None:
        endpoint = endpoint_of(tmp_path, receiver.url("/hook", "cases.example"))
        found = await attempt(endpoint, lookup=lookup, timeout_seconds=SHORT_SECONDS)
        release.set()

        assert found.result == "timeout"

    run(test)


def test_nobody_and_no_name_are_failures(tmp_path: Path) -> None:
    def no_name(host: str, port: int) -> Sequence[tuple[Any, ...]]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    async def test() -> None:
        closed = endpoint_of(tmp_path, f"http://{HOST}:{free_port()}/")
        assert (await attempt(closed)).result == "connection"
        unknown = endpoint_of(tmp_path, "https://cases.example/")
        assert (await attempt(unknown, lookup=no_name)).result == "dns"

    asyncio.run(test())


@pytest.mark.parametrize("host", [HOST, "localhost", "127.1", "[::ffff:127.0.0.1]"])
def test_this_machine_gets_nothing_unless_it_is_allowed(tmp_path: Path, host: str) -> None:
    async def test(receiver: Receiver) -> None:
        url = receiver.url("/hook", host)
        forbidden = endpoint_of(tmp_path, url, allow_networks=["10.0.0.0/8"])

        assert (await attempt(forbidden)).result in ("address", "dns")
        assert receiver.connections == 0

    run(test)


class Rebinding:
    """A name whose address changes from one resolution to the next."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.asked = 0

    def __call__(self, host: str, port: int) -> Sequence[tuple[Any, ...]]:
        self.asked += 1
        address = self.addresses.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]


def test_a_name_is_resolved_once_for_an_attempt_and_checked_at_each(tmp_path: Path) -> None:
    """A name that was permitted, and then leads to another address, gets nothing there."""

    async def test(receiver: Receiver) -> None:
        lookup = Rebinding(HOST, "127.9.9.9")
        url = receiver.url("/hook", "cases.example")
        sender = Sender(endpoint_of(tmp_path, url, allow_networks=[f"{HOST}/32"]), LONG_SECONDS,
                        lookup=lookup)  # fmt: skip
        first = await sender.send("msg_1", BODY)
        second = await sender.send("msg_2", BODY)
        await sender.close()

        assert (first.result, second.result) == ("delivered", "address")
        assert lookup.asked == 2
        assert [request.message_id for request in receiver.requests] == ["msg_1"]
        assert receiver.requests[0].headers["host"] == f"cases.example:{receiver.port}"

    run(test)


def test_the_address_of_the_socket_is_checked_even_if_the_resolver_was_fooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(receiver: Receiver) -> None:
        url = receiver.url("/hook", "cases.example")
        sender = Sender(endpoint_of(tmp_path, url, allow_networks=["10.0.0.0/8"]), LONG_SECONDS,
                        lookup=Rebinding(HOST))  # fmt: skip
        connector = sender._session.connector
        assert connector is not None
        resolver = connector._resolver  # type: ignore[attr-defined]
        monkeypatch.setattr(resolver, "_policy", endpoint_of(tmp_path, url).policy)
        found = await sender.send("msg_1", BODY)
        await sender.close()

        assert found.result == "address"
        assert receiver.connections == 0

    run(test)


def test_of_several_addresses_only_the_permitted_ones_are_tried(tmp_path: Path) -> None:
    def lookup(host: str, port: int) -> Sequence[tuple[Any, ...]]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in ("10.255.255.1", HOST)
        ]

    async def test(receiver: Receiver) -> None:
        url = receiver.url("/hook", "cases.example")

        assert (await attempt(endpoint_of(tmp_path, url), lookup=lookup)).is_delivered

    run(test)


def test_tls_verifies_the_authority_and_the_name(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    other = Authority.create(tmp_path, "other")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue(tmp_path, "cases", hosts=(HOST,)))

    def lookup(host: str, port: int) -> Sequence[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOST, port))]

    async def test() -> None:
        async with Receiver().running(context) as receiver:
            for url, cafile, expected in (
                (receiver.url("/hook"), authority.cafile, "delivered"),
                (receiver.url("/hook"), other.cafile, "tls"),
                (receiver.url("/hook", "cases.example"), authority.cafile, "tls"),
            ):
                endpoint = endpoint_of(tmp_path, url, ca_file=str(cafile))
                assert (await attempt(endpoint, lookup=lookup)).result == expected
            assert len(receiver.requests) == 1

    asyncio.run(test())


def test_a_proxy_of_the_environment_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{HOST}:{free_port()}")
    monkeypatch.setenv("http_proxy", f"http://{HOST}:{free_port()}")

    async def test(receiver: Receiver) -> None:
        assert (await attempt(endpoint_of(tmp_path, receiver.url("/hook")))).is_delivered

    run(test)


def test_cookies_are_not_kept_and_connections_are_not_reused(tmp_path: Path) -> None:
    async def test(receiver: Receiver) -> None:
        receiver.answers["/hook"] = status(200, "Set-Cookie: a=b")
        sender = Sender(endpoint_of(tmp_path, receiver.url("/hook")), LONG_SECONDS)
        for _ in range(2):
            assert (await sender.send("msg_1", BODY)).is_delivered
        await sender.close()

        requests: list[Received] = receiver.requests
        assert all("cookie" not in request.headers for request in requests)
        assert receiver.connections == 2

    run(test)
