from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from standardwebhooks import Webhook

from recur_client import (
    AsyncClient,
    Client,
    ConnectionLostError,
    DeadlineError,
    PendingError,
    ProblemError,
    WebhookError,
    WebhookVerifier,
)

TRANSACTION = {"transaction_id": "t/1", "account_id": "A1", "amount": 5.0}
Answer = tuple[int, dict[str, str], Any]
CUT: Answer = (0, {}, None)
HANG: Answer = (-1, {}, None)
DRIP: Answer = (-2, {}, None)
DRIP_HEAD: Answer = (-3, {}, None)
SCORE: Answer = (200, {}, {"score": 0.5})
PENDING: Answer = (202, {"Location": "/v1/scores/t%2F1", "Retry-After": "1"}, {})


class Server(ThreadingHTTPServer):
    """A server that answers with each of its answers in turn, and then with the last again."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answers: list[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.seen: list[tuple[str, str, bytes]] = []
        self.times: list[float] = []
        self.released = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def _serve(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        place = min(len(server.seen), len(server.answers) - 1)
        server.seen.append((self.command, self.path, body))
        server.times.append(time.monotonic())
        status, headers, value = server.answers[place]
        self.close_connection = True
        if status <= 0:
            if status in (-2, -3):
                self.drip(server, in_head=status == -3)
            elif status < 0:
                server.released.wait(60)
            return
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def drip(self, server: Server, in_head: bool) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n")
        self.wfile.write(b"X-Long: " if in_head else b"\r\n")
        with suppress(OSError):
            while not server.released.wait(0.05):
                self.wfile.write(b"x")

    do_GET = do_POST = _serve

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(*answers: Answer) -> Iterator[Server]:
    with Server(list(answers)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def score_sync(address: str, seconds: float) -> Any:
    with Client(address, "k", timeout_seconds=seconds) as client:
        return client.score(TRANSACTION)


def score_async(address: str, seconds: float) -> Any:
    async def run() -> Any:
        async with AsyncClient(address, "k", timeout_seconds=seconds) as client:
            return await client.score(TRANSACTION)

    return asyncio.run(run())


Score = Callable[[str, float], Any]
both = pytest.mark.parametrize("score", [score_sync, score_async])


@both
def test_failures_are_retried_with_the_same_body(score: Score) -> None:
    with serving(CUT, (503, {}, {}), (502, {}, "page"), CUT, SCORE) as server:
        assert score(server.address, 60) == {"score": 0.5}
    assert len(server.seen) == 5
    assert len(set(server.seen)) == 1


@both
@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {"RateLimit": '"k";r=0;t=1'}])
def test_the_wait_that_a_refusal_asks_for_is_kept(score: Score, headers: dict[str, str]) -> None:
    with serving((429, headers, {}), SCORE) as server:
        score(server.address, 60)
    assert server.times[1] - server.times[0] >= 0.99


@both
def test_a_wait_past_the_deadline_ends_the_call_at_once(score: Score) -> None:
    with serving((429, {"Retry-After": "900"}, {})) as server:
        with pytest.raises(ProblemError) as caught:
            score(server.address, 60)
    assert (caught.value.status, len(server.seen)) == (429, 1)


@both
def test_a_wait_may_be_a_date(score: Score) -> None:
    until = formatdate(time.time() + 900, usegmt=True)
    with serving((429, {"Retry-After": until}, {})) as server, pytest.raises(ProblemError):
        score(server.address, 60)
    with serving((429, {"Retry-After": "soon"}, {}), SCORE) as server:
        assert score(server.address, 60) == {"score": 0.5}


@both
@pytest.mark.parametrize("drip", [DRIP, DRIP_HEAD], ids=["body", "head"])
def test_a_dripping_gateway_ends_with_the_deadline(score: Score, drip: Answer) -> None:
    with serving(drip) as server, pytest.raises(DeadlineError):
        score(server.address, 0.5)


def test_a_client_goes_on_after_a_deadline_and_in_several_threads() -> None:
    answers = [DRIP_HEAD, *[SCORE] * 8]
    with serving(*answers) as server, Client(server.address, "k", timeout_seconds=0.5) as client:
        with pytest.raises(DeadlineError):
            client.score(TRANSACTION)
        client._timeout_seconds = 60
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(client.score, [TRANSACTION] * 8))
    assert found == [{"score": 0.5}] * 8


@both
def test_a_hanging_gateway_ends_with_the_deadline(score: Score) -> None:
    with serving(HANG) as server, pytest.raises(DeadlineError):
        score(server.address, 0.5)


@both
def test_no_gateway_is_a_lost_connection(score: Score) -> None:
    with serving(SCORE) as server:
        address = server.address
    with pytest.raises(ConnectionLostError):
        score(address, 0.5)


@both
def test_a_pending_score_is_polled_and_never_posted_again(score: Score) -> None:
    with serving(PENDING, PENDING, CUT, SCORE) as server:
        assert score(server.address, 60) == {"score": 0.5}
    assert [(m, p) for m, p, _ in server.seen] == [
        ("POST", "/v1/scores"),
        *[("GET", "/v1/scores/t%2F1")] * 3,
    ]


@both
def test_a_score_that_stays_pending_tells_its_place(score: Score) -> None:
    with serving(PENDING) as server, pytest.raises(PendingError) as caught:
        score(server.address, 0.5)
    assert caught.value.location == "/v1/scores/t%2F1"


@both
def test_the_key_never_goes_to_another_host(score: Score) -> None:
    with serving(SCORE) as other, serving((202, {"Location": other.address}, {})) as server:
        with pytest.raises(ProblemError):
            score(server.address, 60)
    assert other.seen == []


@both
def test_a_problem_names_the_field_and_is_not_retried(score: Score) -> None:
    problem = {
        "type": "/problems/invalid-fields",
        "title": "Fields are not valid",
        "errors": [{"detail": "Expected `float`", "pointer": "/amount"}],
    }
    with serving((422, {}, problem)) as server, pytest.raises(ProblemError, match="/amount") as e:
        score(server.address, 60)
    assert (e.value.kind, e.value.errors[0].pointer) == ("invalid-fields", "/amount")
    assert len(server.seen) == 1


def test_alerts_follow_the_cursor() -> None:
    pages: list[Answer] = [
        (200, {}, {"alerts": [{"n": 1}, {"n": 2}], "cursor": "c1", "more": True}),
        (200, {}, {"alerts": [{"n": 3}], "cursor": "c2", "more": False}),
    ]
    with serving(*pages) as server, Client(server.address, "k") as client:
        assert [alert["n"] for alert in client.alerts(from_=5)] == [1, 2, 3]
    assert [path for _, path, _ in server.seen] == [
        "/v1/alerts?from=5",
        "/v1/alerts?cursor=c1&from=5",
    ]


def _headers(now: datetime, signature: str) -> dict[str, str]:
    sent = str(int(now.timestamp()))
    return {"Webhook-Id": "m1", "Webhook-Timestamp": sent, "Webhook-Signature": signature}


def _secret(text: str) -> str:
    return "whsec_" + base64.b64encode(text.encode() * 4).decode()


def test_webhooks_of_the_reference_library_are_verified_while_a_secret_rotates() -> None:
    old, new, now = _secret("old-key!"), _secret("new-key!"), datetime.now(UTC)
    headers = _headers(now, "v1,bad " + Webhook(old).sign("m1", now, "{}"))
    assert WebhookVerifier([new, old]).verify(b"{}", headers) == "m1"
    with pytest.raises(WebhookError):
        WebhookVerifier([new]).verify(b"{}", headers)
    with pytest.raises(WebhookError):
        WebhookVerifier([old]).verify(b"{ }", headers)
    with pytest.raises(WebhookError, match="old"):
        WebhookVerifier([old]).verify(b"{}", headers, now_seconds=now.timestamp() + 302)


def test_webhooks_signed_by_a_private_key_are_verified() -> None:
    key, now = Ed25519PrivateKey.generate(), datetime.now(UTC)
    public = "whpk_" + base64.b64encode(key.public_key().public_bytes_raw()).decode()
    signed = key.sign(f"m1.{int(now.timestamp())}.{{}}".encode())
    headers = _headers(now, "v1a," + base64.b64encode(signed).decode())
    assert WebhookVerifier([public]).verify(b"{}", headers) == "m1"
    with pytest.raises(WebhookError):
        WebhookVerifier([public]).verify(b"{1}", headers)
    with pytest.raises(WebhookError):  # a public key is no shared secret
        WebhookVerifier([public]).verify(b"{}", _headers(now, "v1,AAAA"))


def test_the_client_imports_neither_torch_nor_the_pipeline() -> None:
    source = Path(__file__).parents[2] / "client" / "src"
    code = (
        f"import sys; sys.path.insert(0, {str(source)!r}); import recur_client;"
        "print(*sorted({m.partition('.')[0] for m in sys.modules}"
        " & {'torch', 'pipeline', 'model', 'cryptography', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_both_clients_send_the_same_requests() -> None:
    def call(client: Any) -> list[Any]:
        return [
            client.batch([TRANSACTION], wait_seconds=3),
            client.get_score("t/1"),
            client.what_if(TRANSACTION, [{"amount": 1}]),
            client.label({"label": "fraud"}),
            client.account("a/ü"),
            client.alert_page("c1", limit=2),
        ]

    async def run(address: str) -> list[Any]:
        async with AsyncClient(address, "k") as client:
            return [await one for one in call(client)]

    answer: Answer = (200, {}, {"results": []})
    with serving(answer) as server, Client(server.address, "k") as client:
        assert call(client) == asyncio.run(run(server.address))
    assert server.seen[:6] == server.seen[6:]
    assert [(method, path) for method, path, _ in server.seen[:6]] == [
        ("POST", "/v1/scores/batch"),
        ("GET", "/v1/scores/t%2F1"),
        ("POST", "/v1/what-if"),
        ("POST", "/v1/labels"),
        ("GET", "/v1/accounts/a%2F%C3%BC"),
        ("GET", "/v1/alerts?cursor=c1&limit=2"),
    ]
    assert json.loads(server.seen[2][2]) == {
        "transaction": TRANSACTION,
        "variants": [{"amount": 1}],
    }
