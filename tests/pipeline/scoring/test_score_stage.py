"""The score stage: failures, duplicates, warm-up, invalid states, expiry, the state cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from pipeline.messages.scores import decode_alert, decode_score
from pipeline.messages.transactions import WARM_HEADER
from pipeline.scoring.scorer import FAILURES_IN_A_ROW_MAX, ScorerBrokenError
from tests.fakes.memory_workers import (
    DAY_MS,
    START_MS,
    MemoryWorker,
    World,
    finish,
)
from tests.pipeline.scoring.helpers import POISON, Brittle, lose_everything, one_poll, read_on

pytestmark = pytest.mark.usefixtures("no_waits")

REASON_TOLERANCE = 0.02
"""Tolerance of a weight: other sizes of micro-batches give other last bits."""


def test_reasons_depend_on_the_state_before_the_transaction_not_on_the_micro_batch() -> None:
    """One large micro-batch gives the same reasons as many small ones."""
    found = []
    for size in (1, 100):
        world = World(topic_partitions=2, review_threshold=0.0, micro_batch_max=size)
        world.produce_many(60)
        read_on(world)
        found.append(
            {
                alert.source: [(reason.code, reason.weight) for reason in alert.reasons]
                for record in world.kafka.records("alerts")
                for alert in [decode_alert(record.value or b"")]
            }
        )
    one, many = found
    assert one.keys() == many.keys()
    for source, reasons in one.items():
        assert dict(many[source]) == pytest.approx(dict(reasons), abs=REASON_TOLERANCE), source


def test_only_the_transaction_that_fails_in_the_computation_is_rejected() -> None:
    world = World()
    for i in range(30):
        world.produce(f"A{i % 5}", amount=POISON if i in (3, 4, 17) else 20.0 + i)
    poisoned = {
        (p, record.offset)
        for p in world.partitions
        for record in world.kafka.records("transactions", p)
        if b"666.0" in (record.value or b"")
    }

    worker = read_on(world, checkpoint=Brittle())

    assert world.dead_letters() == {(p, offset, "computation"): 1 for p, offset in poisoned}
    for p in world.partitions:
        end = world.kafka.bounds("transactions", p).end
        assert set(world.scores(p)) == set(range(end)) - {o for q, o in poisoned if q == p}
    assert worker.count("recur_transactions_total") == 27
    assert worker.count("recur_fraud_score_count") == 27


def test_a_worker_ends_without_publishing_if_every_computation_fails() -> None:
    world = World(topic_partitions=1, micro_batch_max=100)
    for _ in range(FAILURES_IN_A_ROW_MAX + 1):
        world.produce("A", amount=POISON)

    with pytest.raises(ScorerBrokenError):
        finish(world.worker(checkpoint=Brittle()).run())

    assert not world.dead_letters()
    assert not world.scores(0)
    assert world.watermark(0) == 0


def test_a_duplicate_transaction_is_dropped_and_counted() -> None:
    world = World(topic_partitions=1, review_threshold=0.0)
    for _ in range(3):
        world.produce("A", "same", amount=300.0, timestamp=START_MS)
    world.produce("A", "other", amount=300.0)

    worker = read_on(world)

    assert sorted(world.scores(0)) == [0, 3]
    assert world.alerts().keys() == {"transactions:0:0", "transactions:0:3"}
    assert worker.count("recur_duplicate_transactions_total") == 2
    assert worker.count("recur_transactions_total") == 2
    assert world.watermark(0) == 4
    world_states = world.references()[0].accounts["A"]
    assert world_states.last_offset == 3


def test_a_warm_up_transaction_is_scored_without_an_alert() -> None:
    world = World(topic_partitions=1, review_threshold=0.0)
    world.produce("A", headers=[(WARM_HEADER, b"")])
    world.produce("A", headers=[("other", b"1"), (WARM_HEADER, b"1")])
    world.produce("A", headers=[("other", b"1")])

    read_on(world)

    assert sorted(world.scores(0)) == [0, 1, 2]
    assert world.alerts().keys() == {"transactions:0:2"}


def test_states_are_counted_by_result() -> None:
    world = World(topic_partitions=1, state_ttl_days=1.0)
    counts: Counter[str] = Counter()

    def applied_by(worker: MemoryWorker, accounts: str) -> None:
        for account in accounts:
            world.produce(account)
        one_poll(worker)

    applied_by(first := world.worker(), "AB")
    world.store.states[0, "B"] = b"damaged"
    applied_by(second := world.worker(), "ABC")
    applied_by(second, "AB")
    world.now_ms += 2 * DAY_MS
    applied_by(third := world.worker(), "A")

    for worker in (first, second, third):
        for result in ("cached", "loaded", "missing", "invalid", "expired"):
            counts[result] += int(worker.count("recur_states_total", result=result))
    assert counts == {"cached": 2, "loaded": 2, "missing": 3, "invalid": 1, "expired": 1}


def test_scores_of_an_account_with_an_invalid_state_are_marked() -> None:
    """Duplicates, dead letters, published scores and another partition are not marked."""
    world = World(topic_partitions=2, review_threshold=0.0, decline_threshold=1.0)
    a, b, c = world.account_in(0), world.account_in(0, 1), world.account_in(1)

    def produce(*names: str) -> list[str]:
        return [f"{world.topic}:{p}:{offset}" for p, offset in map(world.produce, names)]

    def marked(records: Iterator[bytes | None]) -> set[str]:
        found = [decode_score(value or b"") for value in records]
        assert {score.state for score in found} <= {None, "invalid"}
        return {score.source for score in found if score.state == "invalid"}

    produce(a, b, c)
    finish(world.worker().run())
    world.store.states[0, b] = world.store.states[0, b][:-1]
    world.store.states[1, c] = b""
    _, first = produce(a, b)
    world.produce(b, "again", timestamp=START_MS)
    world.produce_raw(b.encode(), b"rejected")
    world.produce(b, "again", timestamp=START_MS)
    (of_c,) = produce(c)
    again = f"{world.topic}:0:4"
    worker = world.worker()
    one_poll(worker)

    scores = world.kafka.records("scores", 0) + world.kafka.records("scores", 1)
    assert marked(record.value for record in scores) == {first, again, of_c}
    assert marked(record.value for record in world.kafka.records("alerts")) == {first, again, of_c}
    assert worker.count("recur_states_total", result="invalid") == 2

    produce(a, b, c)
    finish(worker.run())
    assert len(marked(record.value for record in world.kafka.records("alerts"))) == 3


def test_states_in_memory_are_bounded_and_unsaved_ones_are_kept() -> None:
    world = World(topic_partitions=1, state_cache_size=0, micro_batch_max=5)
    for i in range(200):
        world.produce(f"A{i * i % 37}")
    worker = world.worker()
    most = []

    def measure(name: str) -> None:
        owned = worker.ownership.owned(0)
        most.append(0 if owned is None else len(owned.states))

    world.interrupt(measure)
    finish(worker.run())

    assert 0 < max(most) <= 3 * 5
    world.assert_all_applied(alerts_once=True)


def test_an_account_that_was_silent_too_long_is_reset_also_in_a_replay() -> None:
    world = World(topic_partitions=1, state_ttl_days=1.0)
    for _ in range(5):
        world.produce("A")
    world.now_ms += 2 * DAY_MS
    for _ in range(5):
        world.produce("A")
    read_on(world)
    world.assert_all_applied()
    lose_everything(world)
    world.produce("A")

    read_on(world)

    world.assert_all_applied()
    assert world.references()[0].accounts["A"].first_offset == 5
