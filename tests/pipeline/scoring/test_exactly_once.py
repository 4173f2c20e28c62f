"""Exactly-once processing: scores, alerts, dead letters and offsets in Kafka transactions.

On a broker in memory that fences and takes back as Kafka does; tests/live/test_transactional.py
does it on a real one.
"""

from __future__ import annotations

import random

import pytest

from pipeline.scoring import recovery as recovery_module
from tests.fakes import memory as memory_module
from tests.fakes.memory_workers import World, finish
from tests.pipeline.scoring.helpers import (
    Simulation,
    count_steps,
    die,
    kill_at,
    kill_repeatedly,
    lose_everything,
    next_poll,
    nothing,
    one_poll,
    produce_everywhere,
    read_on,
    run_until_killed,
    small_world,
    when,
    when_nth,
)
from tests.seeds import seeds


def assert_exactly_once(world: World) -> None:
    """Check that everything is applied, and that each committed record is published once."""
    world.assert_all_applied(alerts_once=True)
    dead_letters = world.dead_letters()
    assert set(dead_letters.values()) <= {1}, "a rejected record has two dead letters"


def committed(world: World, partition: int) -> int | None:
    return world.kafka.committed("recur", "transactions", partition)


@pytest.mark.parametrize("polls_waiting", [0, 1])
@pytest.mark.parametrize("records_max", [1, 7, 1000])
def test_a_clean_run_publishes_and_commits_everything_once(
    polls_waiting: int, records_max: int
) -> None:
    """Transaction markers between scores do not count as zombie scores."""
    world = World(processing_guarantee="exactly_once")
    world.produce_many(120)
    worker = world.worker()

    finish(worker.run(polls_waiting, records_max))

    assert_exactly_once(world)
    for name in ("scores_recovered", "watermark_conflicts", "zombie_scores", "fenced"):
        assert worker.count(f"recur_{name}_total") == 0
    assert worker.count("recur_records_skipped_total", reason="applied") == 0
    for partition in world.partitions:
        assert committed(world, partition) == world.watermark(partition)
    assert not any(worker.acked), "nothing is left for the consumer to commit"


@pytest.mark.parametrize("number", range(count_steps(processing_guarantee="exactly_once")))
def test_a_worker_killed_at_any_step_publishes_nothing_twice(number: int) -> None:
    world = small_world(processing_guarantee="exactly_once")
    kill_at(world, number)

    worker = read_on(world)

    assert_exactly_once(world)
    assert worker.count("recur_watermark_conflicts_total") == 0
    assert worker.count("recur_records_lost_total") == 0


@pytest.mark.parametrize("seed", seeds(25))
def test_workers_killed_repeatedly_publish_nothing_twice(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are killed during recovery, too, and read published scores in pieces."""
    monkeypatch.setattr(recovery_module, "RECOVERY_LOOKAHEAD", 3)
    monkeypatch.setattr(memory_module, "FETCH_RECORDS", 2)
    rng = random.Random(seed)
    world = World(micro_batch_max=rng.choice([3, 8, 30]), processing_guarantee="exactly_once")
    world.produce_many(60, seed=seed)
    kill_repeatedly(world, rng)

    read_on(world)

    assert_exactly_once(world)


@pytest.mark.parametrize("seed", seeds(100))
def test_nothing_is_published_twice_whichever_worker_overtakes(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zombies, deaths at any step and a store set back cause no duplicate in transactions."""
    monkeypatch.setattr(recovery_module, "RECOVERY_LOOKAHEAD", 3)
    monkeypatch.setattr(memory_module, "FETCH_RECORDS", 2)
    world = Simulation(seed, workers_max=3, processing_guarantee="exactly_once").run()
    produce_everywhere(world)

    read_on(world)

    assert_exactly_once(world)


def test_committed_but_unsaved_records_are_applied_without_a_new_record() -> None:
    """The group starts past the watermark, and no new record reveals it."""
    world = World(topic_partitions=1, processing_guarantee="exactly_once")
    world.produce_many(20)
    world.interrupt(when_nth("before save", 3, die))  # the first save is of the watermark
    run_until_killed(world.worker())
    assert world.watermark(0) < (committed(world, 0) or 0)

    world.interrupt(nothing)
    worker = world.worker()
    while world.watermark(0) < (committed(world, 0) or 0):
        poll = worker.consumer.poll(1)
        assert poll is not None, "the log is not read back"
        finish(worker.process(poll))

    finish(worker.run())
    assert_exactly_once(world)


def test_a_fenced_worker_gives_the_partition_up_until_it_is_assigned_again() -> None:
    world = World(topic_partitions=1, processing_guarantee="exactly_once")
    world.produce_many(40)
    one_poll(world.worker(), 5)
    zombie, owner = world.worker(), world.worker()
    one_poll(zombie, 5)
    zombies = zombie.process(next_poll(zombie, 10))

    def overtake() -> None:
        world.interrupt(nothing)
        one_poll(owner, 7)

    world.interrupt(when("before commit transaction", overtake))
    finish(zombies)

    assert zombie.fenced == [0]
    assert zombie.count("recur_fenced_total") == 1
    assert world.watermark(0) == committed(world, 0) == 12
    finish(zombie.run())
    assert world.watermark(0) == 12, "it works on a partition that is not its own"
    finish(owner.run())
    assert owner.fenced == []
    assert_exactly_once(world)


def test_a_fenced_owner_continues_when_the_partition_is_assigned_again() -> None:
    """A zombie that takes the partition late has the newer epoch for a moment."""
    world = World(topic_partitions=1, processing_guarantee="exactly_once")
    world.produce_many(40)
    owner, late = world.worker(), world.worker()
    one_poll(owner, 10)
    owners = owner.process(next_poll(owner, 5))

    def take_late() -> None:
        world.interrupt(nothing)
        one_poll(late, 20)

    world.interrupt(when("before write transaction", take_late))
    finish(owners)
    assert owner.fenced == [0]
    assert world.watermark(0) == committed(world, 0) == 20

    owner.rebalance([0])
    finish(owner.run())
    finish(late.run())
    assert_exactly_once(world)


def test_committed_offsets_never_decrease_during_a_recovery() -> None:
    """This also holds if the scores are lost, too, and are published again."""
    world = World(topic_partitions=1, processing_guarantee="exactly_once")
    world.produce_many(40)
    finish(world.worker().run())
    lose_everything(world)
    world.kafka.delete_records("scores", 0, world.kafka.bounds("scores", 0).end)
    seen: list[int] = []
    world.interrupt(lambda name: seen.append(committed(world, 0) or 0))
    produce_everywhere(world)

    finish(world.worker().run())

    assert seen == sorted(seen)
    world.interrupt(nothing)
    assert_exactly_once(world)
