"""Control records: an account is forgotten, a look changes nothing."""

from __future__ import annotations

import pytest

from pipeline.kafka.polls import Chunk, Poll
from pipeline.messages.control import CONTROL_HEADER
from pipeline.messages.scores import decode_score
from tests.fakes.memory_workers import (
    World,
    finish,
)
from tests.pipeline.scoring.helpers import POISON, Brittle, next_poll, read_on

pytestmark = pytest.mark.usefixtures("no_waits")


@pytest.mark.parametrize("records_max", [1, 2, 3, 100])
def test_a_forgotten_account_starts_without_a_state(
    records_max: int,
) -> None:
    """The position of the control record in the log counts, not the end of a poll."""
    world = World(topic_partitions=1)
    for amount in (20.0, 500.0):
        world.produce("A", amount=amount)
    world.produce("B")
    _, forgotten = world.forget("A")
    world.produce("A", "again", amount=30.0)
    world.forget("A")
    world.produce("A", "again", amount=40.0)  # no duplicate: the id is forgotten, too
    world.forget("B")
    world.forget("A")
    world.forget("A")
    world.produce("A", amount=50.0)
    worker = world.worker()

    finish(worker.run(records_max=records_max))

    world.assert_all_applied(alerts_once=True)
    assert sorted(account for _, account in world.store.states) == ["A"]
    features = [decode_score(values[0]).features for values in world.scores(0).values()]
    assert [raw["transactions_seen"] for raw in features] == [1, 2, 1, 1, 1, 1]
    assert worker.count("recur_accounts_forgotten_total") == 5
    found, _, _ = worker.scorer.codec.decode([world.store.states[0, "A"]])
    assert int(found.first_offset[0]) > forgotten
    assert int(found.history.count[0]) == 1
    assert worker.count("recur_rejected_total", reason="control") == 0


def test_states_in_memory_do_not_undo_a_forget_request() -> None:
    """The next poll is computed before the store deletes the state."""
    world = World(topic_partitions=1)
    world.produce("A", "t-1", amount=900.0)
    worker = world.worker()
    finish(worker.run())
    world.forget("A")
    world.produce("A", "t-1", amount=20.0)
    first, second = next_poll(worker, 1), next_poll(worker, 1)

    computed = finish(worker.processor.compute(first))
    after = finish(worker.processor.compute(second))
    assert (0, "A") in world.store.states
    finish(worker.processor.conclude(computed))
    assert (0, "A") not in world.store.states
    finish(worker.processor.conclude(after))

    world.assert_all_applied()


def test_an_applied_control_record_is_dropped_when_redelivered() -> None:
    """Later transactions of the account stay, in the store and in the redelivered poll."""
    world = World(topic_partitions=1)
    world.produce("A")
    world.forget("A")
    world.produce("A", amount=70.0)
    owner, late = world.worker(), world.worker()
    old_poll = next_poll(late)
    finish(owner.run())
    world.produce("A", amount=80.0)
    finish(late.process(old_poll))
    assert late.count("recur_accounts_forgotten_total") == 0

    finish(late.run())

    world.assert_all_applied(alerts_once=True)
    world.produce("A", amount=90.0)
    both = world.worker()  # a poll of applied and new records
    finish(both.process(Poll({0: Chunk(0, 5, world.kafka.records("transactions", 0))})))
    world.assert_all_applied(alerts_once=True)
    assert both.count("recur_accounts_forgotten_total") == 0


def test_a_forgotten_account_whose_later_transactions_fail_has_no_state() -> None:
    world = World(topic_partitions=1)
    world.produce("A")
    world.forget("A")
    world.produce("A", amount=POISON)
    world.produce("B")

    read_on(world, checkpoint=Brittle())

    assert sorted(account for _, account in world.store.states) == ["B"]
    assert sorted(world.scores(0)) == [0, 3]


def test_a_control_record_to_look_changes_nothing() -> None:
    world = World(topic_partitions=1)
    world.produce("A")
    world.produce_raw(None, b"", [(CONTROL_HEADER, b"look")])
    world.produce("A")

    worker = read_on(world)

    assert world.watermark(0) == 3
    assert sorted(world.scores(0)) == [0, 2]
    assert not world.dead_letters()
    assert worker.count("recur_accounts_forgotten_total") == 0
