"""Answers to records that ask for one, on a broker and a store in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.kafka.producer import AppendResult, Outgoing
from pipeline.messages.replies import (
    REPLY_HEADER,
    Reply,
    StoredAnswer,
    content_hash,
    decode_replies,
)
from pipeline.storage.client import StoreForbiddenError, StoreUnavailableError
from tests.fakes.memory import MemoryPollStore, MemoryProducer
from tests.fakes.memory_workers import MemoryWorker, World, finish
from tests.pipeline.scoring.helpers import (
    POISON,
    Brittle,
    count_steps,
    kill_at,
    nothing,
    one_poll,
)

pytestmark = pytest.mark.usefixtures("no_waits")

ASKS = [(REPLY_HEADER, b"gw1")]


def replies_of(worker: MemoryWorker) -> dict[str, list[Reply]]:
    """Return the published replies of a worker by gateway."""
    found: dict[str, list[Reply]] = {}
    for gateway, message in worker.polls.messages:
        found.setdefault(gateway, []).extend(decode_replies(message))
    return found


def answer(world: World, name: str) -> StoredAnswer | None:
    value = world.store.answers.get((0, name))
    return None if value is None else StoredAnswer.from_bytes(value)


def record_value(world: World, offset: int) -> bytes | None:
    (record,) = world.kafka.fetch(world.settings.topic("transactions"), 0, offset, 1)
    return record.value


def assert_answered(world: World, name: str, offset: int) -> None:
    """Check that the answer key names a score of exactly this record."""
    found = answer(world, name)
    assert found is not None
    assert found.kind == "A"
    assert found.content == content_hash(record_value(world, offset))
    (score,) = world.kafka.fetch(world.settings.topic("scores"), 0, found.number, 1)
    assert json.loads(score.value or b"")["transaction_id"] == name
    assert json.loads(score.value or b"")["source"].endswith(f":0:{offset}")


def world_of_five(**settings: Any) -> World:
    """Make a log of five transactions, of which t1 and t3 ask for an answer."""
    world = World(topic_partitions=1, **settings)
    for i in range(5):
        asks = [(REPLY_HEADER, b"gw%d" % i)] if i in (1, 3) else ()
        world.produce(f"A{i % 2}", f"t{i}", headers=asks)
    return world


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
def test_only_records_that_ask_get_an_answer_and_it_names_their_score(guarantee: str) -> None:
    world = world_of_five(processing_guarantee=guarantee)
    worker = world.worker()

    finish(worker.run(records_max=2))

    assert set(world.store.answers) == {(0, "t1"), (0, "t3")}
    replies = replies_of(worker)
    assert {gateway: len(of_it) for gateway, of_it in replies.items()} == {"gw1": 1, "gw3": 1}
    for i in (1, 3):
        assert_answered(world, f"t{i}", i)
        (reply,) = replies[f"gw{i}"]
        (score,) = world.kafka.fetch(world.settings.topic("scores"), 0, reply.offset, 1)
        assert reply == Reply(f"t{i}", "A", score.offset, score.value or b"")


def test_records_without_the_header_publish_and_set_nothing() -> None:
    world = World(topic_partitions=1)
    world.produce_many(20)
    worker = world.worker()

    finish(worker.run())

    assert not world.store.answers
    assert not worker.polls.messages


def test_one_message_goes_to_each_gateway_for_each_poll() -> None:
    world = World(topic_partitions=1)
    for i in range(6):
        world.produce("A", f"t{i}", headers=[(REPLY_HEADER, b"gw%d" % (i % 2))])
    worker = world.worker()

    one_poll(worker)

    messages = worker.polls.messages
    assert [gateway for gateway, _ in messages] == ["gw0", "gw1"]
    assert [[r.transaction_id for r in decode_replies(m)] for _, m in messages] == [
        ["t0", "t2", "t4"],
        ["t1", "t3", "t5"],
    ]


def test_a_rejected_record_is_told_its_reason_and_one_without_an_id_nothing() -> None:
    world = World(topic_partitions=1)
    world.produce("A", "old", headers=ASKS, timestamp=1)
    world.produce("A", "poison", headers=ASKS, amount=POISON)
    world.produce_raw(b"A", b"no json", ASKS)
    worker = world.worker(checkpoint=Brittle())

    finish(worker.run())

    reasons = {"old": "old_timestamp", "poison": "computation"}
    assert {name for _, name in world.store.answers} == set(reasons)
    for offset, (name, reason) in enumerate(reasons.items()):
        content = content_hash(record_value(world, offset))
        assert answer(world, name) == StoredAnswer("R", content, reason=reason)
    assert {(r.transaction_id, r.kind, r.value) for r in replies_of(worker)["gw1"]} == {
        (name, "R", reason.encode()) for name, reason in reasons.items()
    }


def test_a_dropped_duplicate_leaves_the_answer_and_is_told_so() -> None:
    world = World(topic_partitions=1)
    world.produce("A", "t", headers=ASKS)
    value = record_value(world, 0)
    world.produce_raw(b"A", value, ASKS)
    world.produce("A", "other")
    unasked = record_value(world, 2)
    world.produce_raw(b"A", unasked, ASKS)
    worker = world.worker()

    finish(worker.run())

    assert_answered(world, "t", 0)
    assert set(world.store.answers) == {(0, "t")}
    kinds = [(r.transaction_id, r.kind) for r in replies_of(worker)["gw1"]]
    assert kinds == [("t", "A"), ("t", "D"), ("other", "D")]


def test_a_conflict_that_is_rejected_does_not_replace_the_first_answer() -> None:
    world = World(topic_partitions=1, id_conflicts="reject")
    world.produce("A", "t", headers=ASKS)
    world.produce("A", "t", headers=ASKS, amount=99.0)
    worker = world.worker()

    finish(worker.run(records_max=1))

    assert_answered(world, "t", 0)
    assert [r.kind for r in replies_of(worker)["gw1"]] == ["A", "R"]


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
def test_whenever_a_worker_dies_the_answers_are_those_of_the_first_scores(guarantee: str) -> None:
    """The next worker finds scores that are published, but not saved."""
    for number in range(count_steps(processing_guarantee=guarantee)):
        world = world_of_five(processing_guarantee=guarantee)
        try:
            kill_at(world, number)
        except pytest.fail.Exception:  # the run has fewer steps
            break
        world.interrupt(nothing)
        finish(world.worker().run())
        for i in (1, 3):
            assert_answered(world, f"t{i}", i)
    assert number > 5


class Forgetful(MemoryProducer):
    """Producer whose broker does not tell where the scores stand."""

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, AppendResult]:
        await super().publish(scores, alerts, rejected)
        return dict.fromkeys(scores, AppendResult(None, None))


def test_an_offset_that_the_broker_does_not_tell_is_read_from_the_scores() -> None:
    world = world_of_five()
    worker = world.worker(publisher=Forgetful(world.kafka, world.settings))

    finish(worker.run(records_max=2))

    for i in (1, 3):
        assert_answered(world, f"t{i}", i)


@pytest.mark.parametrize("error", [StoreUnavailableError("it is gone"), StoreForbiddenError()])
def test_a_reply_that_redis_does_not_take_is_counted_and_delays_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(MemoryPollStore, "reply", fail)
    world = world_of_five()
    worker = world.worker()

    finish(worker.run())

    world.assert_all_applied(alerts_once=True)
    assert_answered(world, "t1", 1)
    assert worker.count("recur_replies_lost_total") == 2
