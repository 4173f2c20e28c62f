"""Publish and save while the broker or Redis does not answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipeline.kafka.producer import AppendResult, Outgoing, PublishError
from tests.fakes.memory import MemoryProducer
from tests.fakes.memory_workers import (
    World,
    finish,
)
from tests.pipeline.scoring.helpers import die, one_poll, read_on, run_until_killed, when, when_nth

pytestmark = pytest.mark.usefixtures("no_waits")


def test_a_worker_waits_for_redis_and_loses_nothing() -> None:
    world = World(topic_partitions=1)
    world.produce_many(40)
    worker = world.worker()
    seen: list[bool] = []

    def go_away(name: str) -> None:
        if name.startswith("before") and name.split()[1] in ("load", "save") and len(seen) < 12:
            world.store.is_up = not world.store.is_up
            seen.append(worker.health.ready)

    for part in ("redis", "kafka", "partitions"):
        worker.health.up(part)
    world.interrupt(go_away)
    finish(worker.run())

    world.assert_all_applied(alerts_once=True)
    assert worker.count("recur_redis_errors_total") > 0
    assert False in seen, "not ready while Redis is down"
    assert worker.health.ready


def test_a_worker_waits_for_the_broker() -> None:
    world = World(topic_partitions=1)
    world.produce_many(20)
    worker = world.worker()

    def go_away(name: str) -> None:
        if name in ("before committed", "before bounds", "before read scores"):
            world.kafka.is_up = not world.kafka.is_up

    world.interrupt(go_away)
    finish(worker.run())

    world.assert_all_applied(alerts_once=True)
    assert worker.count("recur_kafka_errors_total") > 0


def test_a_worker_that_cannot_publish_ends_without_a_save() -> None:
    world = World(topic_partitions=1)
    world.produce_many(20)
    worker = world.worker()
    one_poll(worker)
    watermark = world.watermark(0)
    world.interrupt(when("before publish scores", lambda: setattr(world.kafka, "is_up", False)))

    with pytest.raises(PublishError):
        finish(worker.run())

    assert world.watermark(0) == watermark
    world.kafka.is_up = True
    read_on(world)
    world.assert_all_applied(alerts_once=True)


def test_an_unknown_offset_of_scores_is_looked_up() -> None:
    """A batch repeated after a lost answer has no offset."""
    world = World(topic_partitions=1)
    world.produce_many(40)

    class Forgetful(MemoryProducer):
        async def publish(
            self,
            scores: dict[int, Sequence[Outgoing]],
            alerts: Sequence[Outgoing],
            rejected: Sequence[Outgoing],
        ) -> dict[int, AppendResult]:
            appended = await super().publish(scores, alerts, rejected)
            return dict.fromkeys(appended, AppendResult(None, None))

    worker = world.worker(publisher=Forgetful(world.kafka, world.settings))
    world.interrupt(when_nth("before save", 3, die))
    run_until_killed(worker)

    read_on(world)

    world.assert_all_applied()
