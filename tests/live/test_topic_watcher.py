"""Topics deleted or created again while a worker runs, and transactions that stay open."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest

from pipeline.errors import StartupError
from pipeline.scoring.health import Health
from pipeline.scoring.topic_watcher import (
    HeldRecords,
    OpenTransactions,
    TopicGoneError,
    TopicWatcher,
)
from pipeline.topic_id import NO_ID, shown
from tests.fakes.clock import Clock

ONE, OTHER = bytes([1] * 16), bytes([2] * 16)


class Ids:
    """A broker's topics and their ids."""

    def __init__(self) -> None:
        self.there = {"transactions": ONE, "scores": ONE, "alerts": ONE}

    async def topic_ids(self, topics: Sequence[str]) -> dict[str, bytes]:
        return {topic: self.there[topic] for topic in topics if topic in self.there}


class Watched:
    """A topic watcher with its health."""

    def __init__(self, *, stops: bool = True) -> None:
        self.ids, self.clock = Ids(), Clock()
        self.health = Health(60.0, self.clock)
        for part in ("redis", "kafka", "partitions"):
            self.health.up(part)
        self.watch = TopicWatcher(
            list(self.ids.there),
            {"transactions": "states"},
            "scores",
            stops,
            30.0,
            self.ids,
            self.health,
            self.clock,
        )

    def look(self) -> set[str]:
        return asyncio.run(self.watch.look())


def test_a_deleted_topic_is_logged_once_and_ends_the_worker_after_a_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = Watched()
    assert world.look() == {"transactions", "scores", "alerts"}
    del world.ids.there["alerts"]

    assert world.look() == {"transactions", "scores"}
    world.clock.now_seconds += 29.0
    world.look()

    (record,) = caplog.records
    assert (record.levelno, record.topic, record.seconds) == (logging.ERROR, "alerts", 30.0)  # type: ignore[attr-defined]
    assert world.health.missing() == {"topics": "alerts was deleted"}
    world.clock.now_seconds += 1.0
    with pytest.raises(TopicGoneError, match=r"alerts .* 30 s .*RECUR_ON_NEW_LOG=begin"):
        world.look()


def test_a_topic_created_again_in_time_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    world = Watched()
    world.look()
    del world.ids.there["alerts"]
    world.look()
    world.ids.there["alerts"] = OTHER  # no data depends on it
    world.clock.now_seconds += 100.0

    world.look()

    assert "the topic exists again" in [record.message for record in caplog.records]
    assert world.health.ready


def test_a_recreated_input_topic_stops_the_worker_or_is_reported() -> None:
    stopping, going_on = Watched(), Watched(stops=False)
    for world in (stopping, going_on):
        world.look()
        world.ids.there["transactions"] = OTHER

    with pytest.raises(StartupError, match=rf"{shown(ONE)} then, {shown(OTHER)} now"):
        stopping.look()
    going_on.look()
    assert going_on.watch.changed == {"transactions"}
    going_on.look()
    assert going_on.watch.changed == set()


def test_a_recreated_scores_topic_is_logged_and_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = Watched()
    world.look()
    world.ids.there["scores"] = OTHER

    world.look()
    world.look()

    (record,) = caplog.records
    assert (record.id_then, record.id_now) == (shown(ONE), shown(OTHER))  # type: ignore[attr-defined]


def test_a_broker_without_topic_ids_has_no_recreated_topics() -> None:
    world = Watched()
    world.ids.there = dict.fromkeys(world.ids.there, NO_ID)
    world.look()
    world.ids.there["transactions"] = ONE

    world.look()

    assert world.watch.changed == set()


def test_a_transaction_that_stays_open_is_logged_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    transactions = OpenTransactions("transactions", clock)

    def see(end: int, stable: int, position: int) -> dict[int, HeldRecords]:
        return transactions.check({3: end}, {3: stable}, {3: position})

    assert see(10, 10, 10) == {}
    assert see(211, 10, 5) == {}  # the worker has not reached it yet
    assert see(211, 10, 10) == {3: HeldRecords(10, 201)}
    assert not caplog.records  # every transaction is open for a moment
    for _ in range(12):
        clock.now_seconds += 5.0
        see(212, 10, 10)

    (record,) = caplog.records
    told = record.topic, record.partition, record.behind_offset, record.records  # type: ignore[attr-defined]
    assert told == ("transactions", 3, 10, 202)
    clock.now_seconds += 5.0
    see(212, 10, 10)
    assert len(caplog.records) == 2
    assert see(213, 213, 213) == {}


def test_transactions_that_end_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Each check finds another open transaction."""
    transactions = OpenTransactions("transactions", Clock())
    for end in range(100, 200, 10):
        transactions.check({0: end + 5}, {0: end}, {0: end})

    assert not caplog.records
