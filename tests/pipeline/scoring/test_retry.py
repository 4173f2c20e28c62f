"""Retrier: calls to a service that does not answer are repeated, counted and logged."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from prometheus_client import CollectorRegistry

from pipeline.kafka.polls import LogUnavailableError
from pipeline.logs import JsonFormatter
from pipeline.scoring import retry as patience_module
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.retry import Retrier
from pipeline.storage.client import StoreUnavailableError

FAILURES = 9


class Flaky:
    """A call that fails several times, then answers."""

    def __init__(self, error: Exception, failures: int) -> None:
        self.error = error
        self.failures = failures
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "answer"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of the Retrier, recorded and not waited."""
    asked: list[float] = []

    async def sleep(seconds: float) -> None:
        asked.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return asked


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
def health() -> Health:
    health = Health(10.0)
    for part in ("redis", "kafka", "partitions"):
        health.up(part)
    return health


def failures_counted(metrics: Metrics) -> dict[str, float | None]:
    return {
        service: metrics.registry.get_sample_value(f"recur_{service}_errors_total")
        for service in ("redis", "kafka")
    }


@pytest.mark.parametrize(
    ("service", "other", "error"),
    [
        ("redis", "kafka", StoreUnavailableError("away")),
        ("kafka", "redis", LogUnavailableError("away")),
    ],
)
def test_a_call_is_repeated_until_the_service_answers(
    waits: list[float], metrics: Metrics, health: Health, service: str, other: str, error: Exception
) -> None:
    retrier = Retrier(metrics, health)
    ask = retrier.retry_redis if service == "redis" else retrier.retry_kafka
    call = Flaky(error, FAILURES)

    assert asyncio.run(ask(call)) == "answer"

    assert call.calls == FAILURES + 1
    assert failures_counted(metrics) == {service: FAILURES, other: 0}
    assert health.ready, "ready again once it answers"


def test_each_attempt_gets_the_arguments(
    waits: list[float], metrics: Metrics, health: Health
) -> None:
    seen: list[tuple[int, str]] = []

    async def call(number: int, *, name: str) -> int:
        seen.append((number, name))
        if len(seen) < 3:
            raise StoreUnavailableError("away")
        return number + 1

    assert asyncio.run(Retrier(metrics, health).retry_redis(call, 7, name="a")) == 8
    assert seen == [(7, "a")] * 3


def test_waits_grow_and_stay_bounded(waits: list[float], metrics: Metrics, health: Health) -> None:
    call = Flaky(StoreUnavailableError("away"), FAILURES)

    asyncio.run(Retrier(metrics, health).retry_redis(call))

    steps = patience_module.RETRY_SECONDS
    assert waits == [*steps, *([steps[-1]] * (FAILURES - len(steps)))]
    assert list(steps) == sorted(steps)
    assert steps[-1] <= 1, "a service that is back is noticed within a second"


def test_the_worker_is_not_ready_while_it_waits(
    monkeypatch: pytest.MonkeyPatch, metrics: Metrics, health: Health
) -> None:
    seen = []

    async def sleep(seconds: float) -> None:
        seen.append(health.missing())

    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(Retrier(metrics, health).retry_kafka(Flaky(LogUnavailableError("away"), 2)))

    assert seen == [{"kafka": "it does not answer"}] * 2


def test_an_answer_at_once_changes_nothing(
    waits: list[float], metrics: Metrics, health: Health
) -> None:
    """An answer does not clear a failure with another cause."""
    health.down("redis", "not reached yet")

    asyncio.run(Retrier(metrics, health).retry_redis(Flaky(StoreUnavailableError(""), 0)))

    assert waits == []
    assert health.missing() == {"redis": "not reached yet"}


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyError("x")])
def test_a_defect_is_not_retried(
    waits: list[float], metrics: Metrics, health: Health, error: Exception
) -> None:
    call = Flaky(error, 1)

    with pytest.raises(type(error)):
        asyncio.run(Retrier(metrics, health).retry_redis(call))

    assert call.calls == 1
    assert failures_counted(metrics) == {"redis": 0, "kafka": 0}


def test_an_outage_is_logged_twice_and_not_at_every_retry(
    waits: list[float], metrics: Metrics, health: Health, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    asyncio.run(
        Retrier(metrics, health).retry_redis(Flaky(StoreUnavailableError("refused"), FAILURES))
    )

    lines = [json.loads(JsonFormatter().format(r)) for r in caplog.records if "service" in vars(r)]
    assert [(line["level"], line["service"]) for line in lines] == [
        ("warning", "redis"),
        ("info", "redis"),
    ]
    assert lines[0]["why"] == "refused"


def test_waiting_can_be_cancelled(metrics: Metrics, health: Health) -> None:
    async def go() -> None:
        waiting = asyncio.create_task(
            Retrier(metrics, health).retry_redis(Flaky(StoreUnavailableError("away"), 10**9))
        )
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(go())
