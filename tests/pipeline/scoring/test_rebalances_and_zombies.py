"""Rebalances, zombies and other writers: every transaction is applied once."""

from __future__ import annotations

from functools import partial

import msgspec
import pytest

from pipeline.messages.scores import Score, decode_score
from pipeline.scoring import recovery as recovery_module
from tests.fakes import memory as memory_module
from tests.fakes.memory_workers import (
    MemoryWorker,
    World,
    finish,
    step,
)
from tests.pipeline.scoring.helpers import (
    Simulation,
    at,
    count_steps,
    next_poll,
    note,
    nothing,
    one_poll,
    produce_everywhere,
    read_on,
    small_world,
    when,
    when_nth,
)
from tests.seeds import seeds

pytestmark = pytest.mark.usefixtures("no_waits")


def test_a_save_that_finds_another_watermark_writes_nothing_and_continues_from_it() -> None:
    world = World(topic_partitions=1)
    world.produce_many(40)
    slow = world.worker()

    def overtake() -> None:
        world.interrupt(nothing)
        quick = world.worker()
        one_poll(quick, 13)

    world.interrupt(when_nth("before save", 2, overtake))
    finish(slow.run())

    world.assert_all_applied(scores_once=False)
    assert slow.count("recur_watermark_conflicts_total") >= 1


def test_records_applied_by_another_worker_are_dropped_and_acked() -> None:
    world = World(topic_partitions=1)
    world.produce_many(20)
    slow = world.worker()
    poll = slow.consumer.poll(8)
    assert poll is not None
    finish(world.worker().run())

    finish(slow.process(poll))

    assert slow.acked == [{0: world.kafka.bounds("transactions", 0).end}]
    assert slow.count("recur_records_skipped_total", reason="applied") == 8
    world.assert_all_applied(alerts_once=True)


def test_a_zombie_that_applies_the_rest_of_the_log_leaves_no_offset_behind() -> None:
    """It may do so at any step, it cannot commit, and no further record comes."""
    for number in range(count_steps(topic_partitions=1)):
        world = small_world(topic_partitions=1)
        zombie, owner = world.worker(), world.worker()

        def overtake(world: World = world, zombie: MemoryWorker = zombie) -> None:
            world.interrupt(nothing)
            finish(zombie.run())

        world.interrupt(at(number, overtake))
        finish(owner.run())

        end = world.kafka.bounds("transactions", 0).end
        assert world.watermark(0) == world.committed(0) == end, number


def test_a_revoked_partition_is_neither_published_nor_saved_nor_acked() -> None:
    for name in ("before load", "after load", "after committed", "after bounds", "before save"):
        world = World(topic_partitions=2, micro_batch_max=100)
        world.produce_many(30)
        worker = world.worker()
        poll = next_poll(worker)
        world.interrupt(when(name, partial(worker.ownership.revoke, [0])))

        finish(worker.processor.process(poll))

        assert 0 not in poll.applied, name
        assert poll.applied[1] > 0, name
        if name != "before save":  # the save of the first watermark
            assert world.scores(0) == {}, name
            assert world.watermark(0) == 0, name


def test_a_partition_revoked_while_its_scores_are_published_is_not_acked() -> None:
    world = World(topic_partitions=1)
    world.produce_many(8)
    worker = world.worker()
    poll = next_poll(worker)
    world.interrupt(when("before publish scores", lambda: worker.rebalance([])))

    finish(worker.process(poll))

    assert poll.applied == {}
    assert worker.acked == []
    read_on(world)
    world.assert_all_applied()


def test_a_poll_from_before_a_reassignment_acks_nothing() -> None:
    world = World(topic_partitions=1)
    world.produce_many(30)
    worker = world.worker()
    poll = next_poll(worker)
    world.interrupt(when("before publish scores", lambda: worker.rebalance([0])))

    finish(worker.process(poll))
    assert poll.applied == {}

    finish(worker.run())
    world.assert_all_applied(alerts_once=False)


def test_a_first_watermark_written_by_another_worker_is_taken_over() -> None:
    """The states loaded before that watermark are not used."""
    world = World(topic_partitions=1)
    for _ in range(20):
        world.produce("A")
    zombie = world.worker()
    old_poll = zombie.consumer.poll(10)
    assert old_poll is not None

    def overtake() -> None:
        world.interrupt(nothing)
        owner = world.worker()
        one_poll(owner, 5)

    world.interrupt(when("after load", overtake))
    finish(zombie.process(old_poll))
    finish(zombie.run())

    world.assert_all_applied(scores_once=False)


def test_zombie_scores_between_own_scores_are_counted_and_stay_the_first() -> None:
    world = World(topic_partitions=1)
    for _ in range(40):
        world.produce("A")
    worker = world.worker()
    one_poll(worker)
    world.interrupt(when("before publish scores", lambda: publish_as_zombie(world, 10, 14)))

    finish(worker.run())

    assert worker.count("recur_zombie_scores_total") == 4
    scores = world.scores(0)
    assert sorted(scores) == list(range(40))
    for offset in range(10, 14):
        first, second = (decode_score(value) for value in scores[offset])
        assert first.score == 0.125, "the first published score is valid"
        assert second.score != 0.125


def publish_as_zombie(world: World, start: int, stop: int, number: float = 0.125) -> None:
    """Publish scores of transactions in [start, stop), which need not exist."""
    for offset in range(start, stop):
        score = Score(
            transaction_id="t",
            account_id="A",
            merchant_id="m1",
            amount=20.0,
            timestamp=1,
            score=number,
            decision="approve",
            model="of a zombie",
            source=f"transactions:0:{offset}",
            features={},
        )
        world.kafka.produce("scores", b"A", msgspec.json.encode(score), partition=0)


def test_zombie_scores_of_later_transactions_are_kept_and_not_published_again() -> None:
    world = World(topic_partitions=1)
    for _ in range(30):
        world.produce("A")
    worker = world.worker()
    world.interrupt(when("before publish scores", lambda: publish_as_zombie(world, 6, 11)))

    for _ in range(4):
        one_poll(worker)

    scores = world.scores(0)
    assert sorted(scores) == list(range(30))
    for offset in range(8, 11):
        assert len(scores[offset]) == 1, "published again after another worker"
    for offset in (6, 7):
        assert len(scores[offset]) == 2, "both workers published at the same time"
    assert worker.count("recur_scores_recovered_total") == 3


def test_a_zombies_successful_save_does_not_hide_the_owners_scores() -> None:
    """The owner published more than the zombie, and the zombie saves first."""
    world = World(topic_partitions=1)
    for i in range(40):
        world.produce("A", amount=10.0 + i)
    one_poll(world.worker(), 5)
    zombie, owner = world.worker(), world.worker()
    zombies = zombie.process(next_poll(zombie, 10))
    owners = owner.process(next_poll(owner, 20))

    def overtake() -> None:
        published: list[str] = []
        world.interrupt(note(published, "after publish scores"))
        while not published:
            step(owners)
        world.interrupt(nothing)

    world.interrupt(when("before publish scores", overtake))
    finish(zombies)
    assert world.watermark(0) == 15
    finish(owners)
    finish(owner.run())

    scores = world.scores(0)
    assert [len(scores[offset]) for offset in range(40)] == [1] * 5 + [2] * 10 + [1] * 25
    world.assert_all_applied(scores_once=False)


@pytest.mark.parametrize("seed", seeds(50))
def test_every_transaction_is_applied_once_whichever_worker_overtakes(
    seed: int,
) -> None:
    world = Simulation(seed, workers_max=3).run()
    produce_everywhere(world)

    read_on(world)

    world.assert_all_applied(scores_once=False)


@pytest.mark.parametrize("seed", seeds(30))
def test_successive_workers_on_a_store_set_back_publish_no_score_twice(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_module, "RECOVERY_LOOKAHEAD", 3)
    monkeypatch.setattr(memory_module, "FETCH_RECORDS", 2)
    world = Simulation(seed, workers_max=1).run()
    produce_everywhere(world)

    read_on(world)

    world.assert_all_applied()
