"""`/metrics`, `/live` and `/ready` over real HTTP, and the watchdog."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partialmethod
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from pipeline.errors import StartupError
from pipeline.local.workers import WorkerProcess
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.worker import http_server as http_server_module
from pipeline.worker.http_server import STALLED_EXIT_CODE, HttpServer

WATCHDOG_SECONDS = 10.0


class Server:
    """An HTTP server whose metrics, health and clock the test sets."""

    def __init__(self, port: int = 0) -> None:
        self.now_seconds = 0.0
        self.metrics = Metrics(CollectorRegistry())
        self.health = Health(WATCHDOG_SECONDS, clock=lambda: self.now_seconds)
        self.exit_codes: list[int] = []
        self.ended = threading.Event()
        self.http_server = HttpServer("127.0.0.1", port, self.metrics, self.health, self._end)

    def _end(self, code: int) -> None:
        self.exit_codes.append(code)
        self.ended.set()

    def get(self, path: str) -> tuple[int, str, str]:
        """Return status, content type and body."""
        url = f"http://{self.http_server.address}{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return reply.status, reply.headers["Content-Type"], reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read().decode()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server_module, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(http_server_module, "GRACE_SECONDS", 0.05)
    serve = partialmethod(ThreadingHTTPServer.serve_forever, poll_interval=0.01)
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", serve)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.http_server.start()
    yield server
    server.http_server.stop()


def test_metrics_can_be_scraped(server: Server) -> None:
    server.metrics.duplicate_transactions.inc(3)
    server.metrics.latency.observe([0.002, 0.5])

    status, kind, body = server.get("/metrics")

    assert status == 200
    assert kind.startswith("text/plain")
    found = {s.name: s.value for f in text_string_to_metric_families(body) for s in f.samples}
    assert found["recur_duplicate_transactions_total"] == 3
    assert found["recur_score_latency_seconds_count"] == 2


def test_a_reader_may_ask_for_samples_by_name_and_keeps_what_it_read_before(
    server: Server,
) -> None:
    server.metrics.duplicate_transactions.inc(3)
    server.metrics.latency.observe([0.002, 0.5])
    host, _, port = server.http_server.address.partition(":")
    process: Any = None
    worker = WorkerProcess(1, process, host, int(port), Path("worker.log"))
    asyncio.run(worker.refresh())
    server.metrics.duplicate_transactions.inc(4)
    server.metrics.latency.observe([0.002])

    _, _, page = server.get("/metrics?name[]=recur_score_latency_seconds_bucket")
    asyncio.run(worker.refresh(["recur_score_latency_seconds_bucket"]))

    names = {s.name for f in text_string_to_metric_families(page) for s in f.samples}
    assert names == {"recur_score_latency_seconds_bucket"}
    assert worker.samples['recur_score_latency_seconds_bucket{le="+Inf"}'] == 3
    assert worker.samples["recur_duplicate_transactions_total"] == 3
    asyncio.run(worker.refresh())
    assert worker.samples["recur_duplicate_transactions_total"] == 7


def test_ready_names_what_is_missing(server: Server) -> None:
    status, kind, body = server.get("/ready")
    assert (status, kind) == (503, "application/json")
    assert json.loads(body)["missing"].keys() == {"redis", "kafka", "partitions"}

    for part in ("redis", "kafka", "partitions"):
        server.health.up(part)
    status, _, body = server.get("/ready")
    assert status == 200
    assert json.loads(body) == {"ready": True, "missing": {}}

    server.health.down("redis", "it does not answer")
    status, _, body = server.get("/ready")
    assert status == 503
    assert json.loads(body) == {"ready": False, "missing": {"redis": "it does not answer"}}


def test_live_stays_true_while_redis_does_not_answer(server: Server) -> None:
    server.health.down("redis", "it does not answer")

    status, _, body = server.get("/live")

    assert status == 200
    assert json.loads(body) == {"live": True, "stalled_seconds": 0.0}


def test_a_stall_turns_live_false_and_then_ends_the_process(
    server: Server,
) -> None:
    server.health.records_wait(True)
    server.now_seconds += WATCHDOG_SECONDS - 0.01
    assert not server.ended.wait(0.05)
    assert server.get("/live")[0] == 200

    server.now_seconds += 0.01
    status, _, body = server.get("/live")
    assert status == 503
    assert json.loads(body) == {"live": False, "stalled_seconds": WATCHDOG_SECONDS}
    assert server.ended.wait(10)
    assert server.exit_codes == [STALLED_EXIT_CODE]


def test_the_ready_gauge_follows_the_health(server: Server) -> None:
    def gauge() -> float:
        (family,) = server.metrics.ready.collect()
        return family.samples[0].value

    def becomes(value: float) -> bool:
        waiting = threading.Event()
        return any(gauge() == value or waiting.wait(0.01) for _ in range(1000))

    for part in ("redis", "kafka", "partitions"):
        server.health.up(part)
    assert becomes(1)
    server.health.down("kafka", "gone")
    assert becomes(0)


@pytest.mark.parametrize("path", ["/", "/metric", "/live/", "/../etc/passwd", "/ready?x=1"])
def test_another_path_is_not_found(server: Server, path: str) -> None:
    assert server.get(path)[0] == 404


def test_requests_are_served_side_by_side(server: Server) -> None:
    """A client that connects and sends nothing does not block others."""
    host, port = server.http_server.address.split(":")
    with socket.create_connection((host, int(port))):
        assert server.get("/live")[0] == 200


def test_a_taken_port_ends_the_start_and_names_the_setting(server: Server) -> None:
    port = int(server.http_server.address.split(":")[1])

    with pytest.raises(StartupError, match=f"127.0.0.1:{port}.*RECUR_HTTP_PORT"):
        Server(port)


def test_a_stopped_server_releases_its_port() -> None:
    first = Server()
    first.http_server.start()
    port = int(first.http_server.address.split(":")[1])
    first.http_server.stop()

    second = Server(port)
    second.http_server.start()
    assert second.get("/live")[0] == 200
    second.http_server.stop()
