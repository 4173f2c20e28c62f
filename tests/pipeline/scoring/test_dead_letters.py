"""Rejected records: reason, truncation, warnings, and the watermark past them."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from pipeline.messages.control import CONTROL_HEADER
from pipeline.scoring.dead_letter import LOG_EVERY_MS, DeadLetters
from pipeline.scoring.metrics import Metrics
from tests.fakes.memory import MemoryRecord
from tests.fakes.memory_workers import (
    DAY_MS,
    World,
)
from tests.pipeline.scoring.helpers import one_poll, read_on

pytestmark = pytest.mark.usefixtures("no_waits")


def test_rejected_records_become_dead_letters_and_the_others_are_scored() -> None:
    world = World(topic_partitions=1)
    world.produce("A")
    world.produce_raw(b"A", b"\xff junk")
    world.produce_raw(None, None)
    world.produce_raw(b"A", None)
    world.produce("A", timestamp=world.now_ms + 3 * DAY_MS)
    world.produce("A", timestamp="1969-12-31T23:59:59Z")
    world.produce("A", headers=[(CONTROL_HEADER, b"forget")])
    world.produce_raw(b"A", None, [(CONTROL_HEADER, b"remember")])
    world.produce_raw(b"A", None, [(CONTROL_HEADER, b"forget"), (CONTROL_HEADER, b"look")])
    world.produce_raw(None, None, [(CONTROL_HEADER, b"forget")])
    world.produce_raw(b"\xff", b"", [(CONTROL_HEADER, b"forget")])
    world.produce("A", amount=-1)
    world.produce_raw(b"B", b'{"transaction_id":"t"}')
    world.produce("A")

    worker = read_on(world)

    assert sorted(world.scores(0)) == [0, 13]
    assert world.watermark(0) == 14
    reasons = [
        "not_json",
        "null_value",
        "null_value",
        "future_timestamp",
        "timestamp",
        *["control"] * 5,
        "amount",
        "missing_field",
    ]
    log, dead = world.kafka.records("transactions"), world.kafka.records("dead-letter")
    assert len(dead) == len(reasons)
    for offset, (record, reason) in enumerate(zip(dead, reasons, strict=True), start=1):
        headers = {name: value.decode() for name, value in record.headers}
        error = headers.pop("error")
        assert 0 < len(error) <= 300
        assert headers == {
            "topic": "transactions",
            "partition": "0",
            "offset": str(offset),
            "reason": reason,
            "time": str(world.now_ms),
        }
        coordinates = f"transactions:0:{offset}".encode()
        assert record.key == (coordinates if log[offset].key is None else log[offset].key)
        assert record.value == log[offset].value
    for reason in set(reasons):
        assert worker.count("recur_rejected_total", reason=reason) == reasons.count(reason)


def test_rejected_records_are_logged_once_a_minute_for_each_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log shows at once that all records of a producer are rejected, but no payload."""
    now_ms = [0]
    letters = DeadLetters("transactions", 100, Metrics(CollectorRegistry()), lambda: now_ms[0])

    def reject(offset: int, reason: str) -> None:
        record = MemoryRecord(offset, 0, b"secret", b"secret", ())
        letters.encode(3, record, reason, "it says secret")

    for offset in range(50):
        reject(offset, "currency")
    reject(50, "amount")
    now_ms[0] = LOG_EVERY_MS
    reject(51, "currency")

    told = [vars(line) for line in caplog.records]
    assert [(line["reason"], line["records"], line["offset"]) for line in told] == [
        ("currency", 1, 0),
        ("amount", 1, 50),
        ("currency", 50, 51),
    ]
    assert "secret" not in str(told)


@pytest.mark.parametrize(
    ("key_bytes", "value_bytes", "truncated"),
    [(10, 100, False), (10, 101, True), (101, 10, True), (1000, 1_000_000, True)],
)
def test_a_long_dead_letter_is_truncated_and_marked(
    key_bytes: int, value_bytes: int, truncated: bool
) -> None:
    world = World(topic_partitions=1, dead_letter_value_max_bytes=100)
    world.produce_raw(b"k" * key_bytes, b"v" * value_bytes)

    read_on(world)

    (record,) = world.kafka.records("dead-letter")
    assert record.key == b"k" * min(key_bytes, 100)
    assert record.value == b"v" * min(value_bytes, 100)
    assert dict(record.headers).get("truncated") == (
        str(value_bytes).encode() if truncated else None
    )


def test_the_longest_dead_letter_fits_the_brokers_default_limit() -> None:
    world = World(topic_partitions=1, dead_letter_value_max_bytes=900_000)
    world.produce_raw(b"k" * 500_000, b"v" * 1_000_000)

    read_on(world)

    (record,) = world.kafka.records("dead-letter")
    headers = sum(len(name) + len(value) for name, value in record.headers)
    assert len(record.key or b"") + len(record.value or b"") + headers < 1_000_000


def test_rejected_records_alone_advance_the_watermark() -> None:
    world = World(topic_partitions=1)
    for _ in range(5):
        world.produce_raw(b"A", b"junk")
    worker = world.worker()

    poll = one_poll(worker)

    assert poll.applied == {0: 5}
    assert world.watermark(0) == 5
    assert worker.count("recur_transactions_total") == 0


def test_applied_rejected_records_are_not_sent_again() -> None:
    world = World(topic_partitions=1)
    for _ in range(5):
        world.produce_raw(b"A", b"junk")
    read_on(world)
    world.kafka.join("recur", "transactions", 0)
    world.kafka._committed.clear()

    worker = read_on(world)

    assert len(world.kafka.records("dead-letter")) == 5
    assert worker.count("recur_records_skipped_total", reason="applied") == 5
