"""Traces with a real broker, a real worker and a collector, and `recur trace`."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from click.testing import CliRunner
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from rich.console import Console

from model.transaction import Transaction
from pipeline.cli.main import recur
from pipeline.errors import RecurError, SettingsError
from pipeline.kafka.topics import ensure_topics
from pipeline.local.kafka import Kafka
from pipeline.local.ports import free_port
from pipeline.local.redis import Redis
from pipeline.messages.labels import Label, encode_label
from pipeline.messages.transactions import encode_transaction
from pipeline.settings import Settings, load_settings
from pipeline.tracing import journey_report
from pipeline.tracing.journey_report import journey_lines, trace_transaction
from tests.fakes.running_gateway import gateways
from tests.fakes.running_pipeline import PipelineUnderTest, transactions, until
from tests.fakes.running_webhooks import webhooks_process
from tests.pipeline.webhooks.receiver import Receiver, endpoint_table, status

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
SERVICE = "service.name"
PARENT = f"00-{TRACE}-{SPAN}-01".encode()
SAMPLED = [("traceparent", PARENT), ("tracestate", b"vendor=1")]


class Collector(ThreadingHTTPServer):
    """A receiver of OTLP over HTTP that keeps the spans."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Any] = []
        self.bodies: list[bytes] = []
        self.services: dict[bytes, str] = {}

    @property
    def url(self) -> str:
        """Address of the collector."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def named(self, name: str) -> list[Any]:
        """Return the spans of a name."""
        return [span for span in self.spans if span.name == name]


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        encoding = self.headers.get("Content-Encoding")
        if encoding == "gzip":
            body = gzip.decompress(body)
        elif encoding == "deflate":
            body = zlib.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        self.server.bodies.append(body)
        for resource in request.resource_spans:
            (service,) = (
                a.value.string_value for a in resource.resource.attributes if a.key == SERVICE
            )
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
                self.server.services |= {span.span_id: service for span in scope.spans}
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""


@contextmanager
def collector() -> Iterator[Collector]:
    """Run a collector in a thread."""
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def system(kafka: Kafka, redis_server: Redis, tmp_path: Path) -> PipelineUnderTest:
    return PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path, topic_partitions=2)


def trace_lines(settings: Settings, transaction: Transaction, **options: Any) -> str:
    """Trace as the command does; return its lines."""
    journey = trace_transaction(settings, transaction.transaction_id, since="1h", **options)
    return "\n".join(journey_lines(journey))


def test_a_sampled_transaction_is_traced_from_its_record_to_score_alert_and_collector(
    system: PipelineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, plain, absent, rejected = transactions(4, accounts=900_000, seed=3)
    # No score is under this threshold.
    system.use(tracing=True, trace_sample_ratio=0, review_threshold=0, decline_threshold=1)

    async def run(spans: Collector) -> None:
        async with system.running(workers=1):
            await system.send_records([_record(traced)], headers=SAMPLED)
            await system.send_records([_record(plain)])
            key, _ = _record(rejected)
            bad = {"transaction_id": rejected.transaction_id, "account_id": rejected.account_id}
            await system.send_records([(key, json.dumps(bad).encode())])
            await system.until_applied()
            await _send_label(system, traced)
        # The worker has stopped, and so it has sent its spans.
        (poll,) = spans.named(f"process {system.settings.topic('transactions')}")
        assert [(s.trace_id.hex(), s.span_id.hex()) for s in poll.links] == [(TRACE, SPAN)]
        alerts = spans.named(f"send {system.settings.topic('alerts')}")
        assert all(alert.parent_span_id == poll.span_id for alert in alerts)
        links = [(link.trace_id.hex(), link.span_id.hex()) for a in alerts for link in a.links]
        assert links == [(TRACE, SPAN)]
        sent = b"".join(spans.bodies)
        for secret in (traced.transaction_id, traced.account_id, traced.merchant_id):
            assert secret.encode() not in sent
        for role in ("scores", "alerts"):
            headers = {r.key: set(r.headers) for r in await system.records(role)}
            assert headers.keys() == {t.account_id.encode() for t in (traced, plain)}
            assert set(SAMPLED) <= headers[traced.account_id.encode()]
            assert not set(SAMPLED) & headers[plain.account_id.encode()]

    with collector() as spans:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", spans.url)
        asyncio.run(run(spans))

    text = trace_lines(system.settings, traced)
    assert f"trace        {TRACE} (sampled)" in text
    stages = [line.split()[0] for line in text.splitlines() if "T" in line and "Z" in line]
    assert stages == ["event", "transaction", "decision", "score", "alert", "label"]
    assert traced.account_id not in text
    assert f"{system.settings.topic('scores')}:" in text
    assert text == trace_lines(system.settings, traced, account_id=traced.account_id)

    assert "\ntrace " not in trace_lines(system.settings, plain)
    assert "missing_field" in trace_lines(system.settings, rejected)

    _check_command(system, traced, monkeypatch)
    with pytest.raises(RecurError, match=r"no record of this transaction .* --since"):
        trace_lines(system.settings, absent)
    with pytest.raises(RecurError, match="the account"):
        trace_lines(system.settings, traced, account_id="another")


def _check_command(
    system: PipelineUnderTest, traced: Transaction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check `recur trace --json`."""
    for name, value in system.overrides.items():
        monkeypatch.setenv(f"RECUR_{name.upper()}", str(value))
    result = CliRunner().invoke(recur, ["trace", traced.transaction_id, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["trace_id"], found["sampled"], found["decision"]) == (TRACE, True, "review")
    event, transaction, *later = found["stages"]
    assert event["time_ms"] == traced.timestamp
    assert transaction["record"].startswith(system.settings.topic("transactions") + ":")
    assert all(stage["record_age_ms"] >= 0 for stage in later)


def _record(transaction: Transaction) -> tuple[bytes, bytes]:
    return transaction.account_id.encode(), encode_transaction(transaction)


async def _send_label(system: PipelineUnderTest, transaction: Transaction) -> None:
    label = Label(
        transaction.transaction_id,
        transaction.account_id,
        transaction.merchant_id,
        "fraud",
        transaction.timestamp,
        int(time.time() * 1000),
    )
    async with AIOKafkaProducer(**system.settings.kafka_client_options()) as producer:
        topic, key = system.settings.topic("labels"), transaction.merchant_id.encode()
        await producer.send_and_wait(topic, encode_label(label), key)


def test_a_request_its_records_and_its_webhook_are_one_trace(
    system: PipelineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, unsampled, malformed = transactions(3, accounts=900_000, seed=8)
    system.use(tracing=True, trace_sample_ratio=0, review_threshold=0, decline_threshold=1)
    not_sampled = PARENT[:-2] + b"00"

    async def run(spans: Collector, receiver: Receiver) -> None:
        endpoints = system.directory / "webhooks.toml"
        url = receiver.url("/cases")
        endpoints.write_text(endpoint_table("cases", url, start="earliest"))
        receiver.answers["/cases"] = status(503, "Retry-After: 1")

        async def has_failed() -> bool:
            return len(receiver.of("/cases")) > 0

        async def has_all() -> bool:
            return {t.transaction_id for t in sent} <= set(receiver.ids("/cases"))

        sent = (traced, unsampled, malformed)
        parents = (PARENT, not_sampled, b"00-00-00-01")
        async with system.running(workers=1), gateways(system) as (gateway,):
            for transaction, parent in zip(sent, parents, strict=True):
                answer = await gateway.score(
                    transaction, traceparent=parent.decode(), tracestate="vendor=1"
                )
                assert answer.status_code == 200, answer.text
            log = system.directory / "webhooks.log"
            options = system.overrides | {"webhooks_file": endpoints, "http_port": 0}
            async with webhooks_process(options, log) as webhooks:
                await until(has_failed, "a first attempt")
                receiver.answers["/cases"] = status(204)
                await until(has_all, "all alerts at the endpoint")
                webhooks.terminate()
                assert await webhooks.wait() == 0, log.read_text()
        # The processes have stopped, and so they have sent their spans.
        (server,) = spans.named("POST /v1/scores")
        assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, SPAN)
        (poll,) = spans.named(f"process {system.settings.topic('transactions')}")
        assert [(s.trace_id, s.span_id) for s in poll.links] == [(server.trace_id, server.span_id)]
        deliveries = spans.named("POST")
        above = {(span.trace_id, span.parent_span_id) for span in deliveries}
        assert above == {(server.trace_id, server.span_id)}
        assert {spans.services[s.span_id] for s in (server, poll, *deliveries)} == {
            "recur-gateway", "recur-worker", "recur-webhooks",
        }  # fmt: skip
        own = f"00-{TRACE}-{server.span_id.hex()}-01".encode()
        for role in ("transactions", "scores", "alerts"):
            headers = {r.key.decode(): dict(r.headers) for r in await system.records(role)}
            assert headers[traced.account_id]["traceparent"] == own
            assert headers[traced.account_id]["tracestate"] == b"vendor=1"
            assert headers[unsampled.account_id]["traceparent"] == not_sampled
            assert "traceparent" not in headers[malformed.account_id]
        got = {request.transaction_id: request.headers for request in receiver.of("/cases")}
        attempts = {f"00-{TRACE}-{span.span_id.hex()}-01" for span in deliveries}
        assert got[traced.transaction_id]["traceparent"] in attempts
        assert got[unsampled.transaction_id]["traceparent"] == not_sampled.decode()
        assert "traceparent" not in got[malformed.transaction_id]
        assert not any("tracestate" in headers for headers in got.values())
        all_sent = b"".join(spans.bodies)
        secrets = (gateway.token, url, traced.transaction_id, traced.account_id, traced.merchant_id)
        assert not [secret for secret in secrets if secret.encode() in all_sent]
        found = await asyncio.to_thread(trace_lines, system.settings, traced)
        assert f"trace        {TRACE} (sampled)" in found
        gateway_id = dict((await system.records("transactions"))[0].headers)["recur-reply-to"]
        assert f", by gateway {gateway_id.decode()}" in found

    async def with_receiver(spans: Collector) -> None:
        async with Receiver().running() as receiver:
            await run(spans, receiver)

    with collector() as spans:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", spans.url)
        asyncio.run(with_receiver(spans))


def test_a_search_goes_back_to_the_given_time_and_no_further_and_shows_its_progress(
    system: PipelineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ms = int(time.time() * 1000)
    old, new = transactions(2, accounts=900_000, seed=4)
    many = transactions(3_000, accounts=900_000, seed=5)

    async def fill() -> None:
        await ensure_topics(system.settings)
        topic = system.settings.topic("transactions")
        options = system.settings.kafka_client_options()
        async with AIOKafkaProducer(**options, linger_ms=5) as producer:
            times = [now_ms - 5 * 3_600_000, *[now_ms - 60_000 for _ in many], now_ms]
            pending = [
                await producer.send(topic, value, key, timestamp_ms=at)
                for (key, value), at in zip(map(_record, (old, *many, new)), times, strict=True)
            ]
            await asyncio.gather(*pending)

    asyncio.run(fill())
    shown = io.StringIO()
    monkeypatch.setattr(journey_report, "PROGRESS_AFTER_SECONDS", 0.0)

    def lines(transaction: Transaction, since: str) -> str:
        journey = trace_transaction(
            system.settings,
            transaction.transaction_id,
            since=since,
            console=Console(file=shown, width=200),
        )
        return "\n".join(journey_lines(journey))

    assert "no score: workers have not reached it" in lines(new, "1h")
    assert "no score" in lines(old, "6h")
    with pytest.raises(RecurError, match="no record of this transaction"):
        lines(old, "4h")
    with pytest.raises(SettingsError, match="--since is no time"):
        lines(old, "yesterday")
    assert f"trace:   0% {system.settings.topic('transactions')}" in shown.getvalue()


def test_a_broker_that_is_away_and_a_missing_topic_are_named(kafka: Kafka) -> None:
    (absent,) = transactions(1, accounts=1)
    away = f"127.0.0.1:{free_port()}"
    settings = load_settings(kafka_bootstrap_servers=away, startup_timeout_seconds=1)
    with pytest.raises(RecurError, match=away):
        trace_lines(settings, absent)
    settings = load_settings(kafka_bootstrap_servers=kafka.bootstrap, topic_prefix="no-such-")
    with pytest.raises(RecurError, match=r"there is no topic no-such-scores .* RECUR_TOPIC_PREFIX"):
        trace_lines(settings, absent)


def test_a_collector_that_hangs_does_not_hold_up_the_end_of_a_worker(
    system: PipelineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.use(tracing=True, trace_sample_ratio=1)

    async def run() -> None:
        async with system.running(workers=1):
            sent = transactions(20, accounts=5)
            await system.send(sent)
            await system.until_applied()
            (worker,) = system.workers
            assert await worker.stop() == 0
        assert "the collector did not take the last spans in time" in worker.log_path.read_text()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        asyncio.run(run())
