"""Scores and alerts as events: their headers stay the same, whoever publishes them and when."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import pytest

from pipeline.messages.scores import decode_alert, decode_score
from pipeline.topic_id import shown
from tests.fakes.memory import MemoryRecord
from tests.fakes.memory_workers import World
from tests.pipeline.scoring.helpers import (
    die,
    kill_repeatedly,
    read_on,
    run_until_killed,
    small_world,
    when_nth,
)
from tests.seeds import seeds

pytestmark = pytest.mark.usefixtures("no_waits")

GUARANTEES = pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])


def published(world: World, role: str) -> list[MemoryRecord]:
    return list(world.kafka.records(world.settings.topic(role)))  # type: ignore[arg-type]


def in_order(world: World, role: str) -> list[tuple[int, bytes | None, bytes | None]]:
    """Return partition, key and value of a topic's records, in order."""
    topic = world.settings.topic(role)  # type: ignore[arg-type]
    return [
        (partition, record.key, record.value)
        for partition in world.partitions
        for record in world.kafka.records(topic, partition)
    ]


def expected_headers(world: World, role: str, record: Any) -> dict[str, bytes]:
    """Compute a record's headers from its value."""
    decode = decode_alert if role == "alerts" else decode_score
    score = decode(record.value)
    source = f"/recur/{world.topic}/{shown(world.kafka.topic_id(world.topic))}/{role}"
    return {
        "ce_specversion": b"1.0",
        "ce_type": f"recur.{role[:-1]}.v1".encode(),
        "ce_source": source.encode(),
        "content-type": b"application/json",
        "ce_id": score.source.encode(),
        "ce_subject": score.transaction_id.encode(),
    }


@GUARANTEES
@pytest.mark.parametrize("seed", seeds(5))
def test_workers_killed_repeatedly_publish_events_with_the_same_headers(
    guarantee: str, seed: int
) -> None:
    rng = random.Random(seed)
    world = World(
        micro_batch_max=rng.choice([3, 8, 30]),
        processing_guarantee=guarantee,
        cloudevents_scores=True,
    )
    world.produce_many(60, seed=seed)
    kill_repeatedly(world, rng)

    read_on(world)

    world.assert_all_applied()
    for role in ("scores", "alerts"):
        records = published(world, role)
        assert records
        for record in records:
            headers = dict(record.headers)
            assert headers.pop("ce_time").startswith(b"2023-11-1")
            assert headers == expected_headers(world, role, record)


def test_an_alert_that_is_published_again_is_the_same_event() -> None:
    world = World(topic_partitions=1, review_threshold=0.0)
    world.produce("A", "t1")
    for saves_before in (1, 0):  # the first save of all is of the first watermark
        world.interrupt(when_nth("before save", saves_before, die))
        run_until_killed(world.worker())
        world.now_ms += 3_600_000

    read_on(world)

    by_id = defaultdict(set)
    records = published(world, "alerts")
    for record in records:
        by_id[dict(record.headers)["ce_id"]].add((record.key, record.headers))
    assert len(records) > 1
    assert len({record.value for record in records}) > 1, "created_at differs"
    assert [len(seen) for seen in by_id.values()] == [1]


def test_headers_change_no_byte_of_keys_and_values() -> None:
    plain = small_world(cloudevents_alerts=False)
    events = small_world(cloudevents_scores=True)
    for world in (plain, events):
        read_on(world)

    for role in ("scores", "alerts", "dead_letter"):
        assert in_order(plain, role) == in_order(events, role)
    assert not any(record.headers for record in published(plain, "scores"))
    assert not any(record.headers for record in published(plain, "alerts"))
    assert all(record.headers for record in published(events, "scores"))


@GUARANTEES
@pytest.mark.parametrize("first", [True, False])
def test_a_worker_takes_scores_over_with_and_without_headers(first: bool, guarantee: str) -> None:
    settings = {"processing_guarantee": guarantee, "topic_partitions": 1}
    world = small_world(cloudevents_scores=first, **settings)
    world.interrupt(when_nth("before save", 3, die))
    run_until_killed(world.worker())
    kept = [(record.value, record.headers) for record in published(world, "scores")]
    assert kept
    assert bool(kept[0][1]) == first

    world.settings = world.settings.model_copy(update={"cloudevents_scores": not first})
    read_on(world)

    world.assert_all_applied()
    now = [(record.value, record.headers) for record in published(world, "scores")]
    assert now[: len(kept)] == kept
    assert bool(now[-1][1]) != first
