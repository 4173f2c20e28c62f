"""Log lines about an outage: at its start, once a minute, at its end."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pipeline.scoring.outages import BURST_MAX, LOG_SECONDS, Outages
from tests.fakes.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outages(clock: Clock, caplog: pytest.LogCaptureFixture) -> Outages:
    caplog.set_level(logging.INFO)
    return Outages(clock)


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [vars(record) | {"text": record.getMessage()} for record in caplog.records]
    caplog.clear()
    return lines


def test_a_long_outage_is_logged_once_a_minute_with_counts(
    outages: Outages, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(1801):  # ten times a second, for three minutes
        outages.failed("kafka", "refused")
        clock.now_seconds += 0.1
    outages.answered("kafka")
    outages.answered("kafka")

    first, *middle, last = told(caplog)
    assert (first["text"], first["why"]) == (
        "a service does not answer; waiting for it",
        "refused",
    )
    assert {line["text"] for line in middle} == {"a service still does not answer"}
    assert 2 <= len(middle) <= 3
    assert (last["text"], last["failures"]) == ("it answers again", 1801)
    assert last["seconds"] == pytest.approx(180.1)


def test_each_service_has_log_lines_of_its_own(
    outages: Outages, caplog: pytest.LogCaptureFixture
) -> None:
    outages.failed("kafka", "")
    outages.failed("redis", "")
    outages.answered("redis")

    assert [line["service"] for line in told(caplog)] == ["kafka", "redis", "redis"]


def test_a_service_that_fails_repeatedly_does_not_fill_the_log(
    outages: Outages, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(600):
        outages.failed("redis", "refused")
        clock.now_seconds += 0.05
        outages.answered("redis")
        clock.now_seconds += 0.05
    assert len(told(caplog)) == 2 * BURST_MAX

    clock.now_seconds += LOG_SECONDS
    outages.failed("redis", "refused")
    assert len(told(caplog)) == 1, "one that begins later is told of again"


def test_a_service_without_an_outage_is_not_logged(
    outages: Outages, caplog: pytest.LogCaptureFixture
) -> None:
    outages.answered("kafka")

    assert told(caplog) == []
