"""Redis loses data or fails over to an older copy: states are computed again from the log."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial

import pytest

from pipeline.messages.decision import DecisionThresholds
from tests.fakes.memory_workers import (
    World,
    finish,
    small_checkpoint,
)
from tests.pipeline.scoring.helpers import (
    lose_everything,
    next_poll,
    note,
    one_poll,
    produce_everywhere,
    read_on,
    small_world,
    when,
    when_nth,
)

pytestmark = pytest.mark.usefixtures("no_waits")


@pytest.mark.parametrize("lose", ["everything", "half"])
@pytest.mark.parametrize("alive", [True, False], ids=["worker alive", "new worker"])
def test_states_are_computed_again_after_a_loss_and_no_score_is_published_twice(
    lose: str, alive: bool
) -> None:
    world = World()
    world.produce_many(60)
    worker = world.worker()
    for _ in range(4):
        one_poll(worker)
    snapshot = world.store.copy()
    finish(worker.run())
    scores = {p: world.scores(p) for p in world.partitions}
    alerts = world.alerts()

    if lose == "everything":
        lose_everything(world)
    else:
        world.store.restore(snapshot)
    if not alive:
        worker = world.worker()
    produce_everywhere(world)
    finish(worker.run())

    world.assert_all_applied()
    for partition, before in scores.items():
        after = world.scores(partition)
        assert {offset: after[offset] for offset in before} == before
    after_alerts = world.alerts()
    assert {source: after_alerts[source] for source in alerts} == alerts
    assert worker.count("recur_scores_recovered_total") > 0


def test_states_are_computed_again_after_a_loss_between_load_and_save() -> None:
    world = World(topic_partitions=1)
    world.produce_many(50)
    worker = world.worker()
    one_poll(worker)

    world.interrupt(when_nth("before save", 1, lambda: lose_everything(world)))
    finish(worker.run())

    world.assert_all_applied()
    assert worker.count("recur_watermark_conflicts_total") >= 1


def test_a_loss_before_the_groups_first_commit_does_not_count_as_a_new_group() -> None:
    """This holds for the save that finds the loss and for the poll computed meanwhile."""
    for number in range(1, 4):
        for late in range(3):
            world = World(topic_partitions=1)
            world.produce_many(40)
            world.interrupt(when_nth("before save", number, partial(lose_everything, world)))
            worker = world.worker()
            worker.consumer.commit = lambda poll: None  # type: ignore[method-assign]
            order = iter([1] * late)

            def choose(alive: Sequence[int], order: Iterator[int] = order) -> int:
                return alive[next(order, 0) % len(alive)]

            finish(worker.run(choose=choose))

            world.assert_all_applied()


@pytest.mark.parametrize("kept", [[], [0]])
def test_a_poll_that_outlives_its_assignment_does_not_count_as_a_new_group(kept: list[int]) -> None:
    """The worker starts from the log, not from the poll.

    The group has committed nothing, and the store lost this worker's first watermark. A start at
    the poll would skip the records before it.
    """
    world = World(topic_partitions=1)
    world.produce_many(20)
    worker = world.worker()
    worker.consumer.commit = lambda poll: None  # type: ignore[method-assign]
    one_poll(worker, 5)
    poll = next_poll(worker, 5)

    def overtake() -> None:
        lose_everything(world)
        worker.rebalance(kept)

    world.interrupt(when("before load", overtake))
    finish(worker.process(poll))
    read_on(world)

    world.assert_all_applied()


def test_states_are_computed_again_after_repeated_losses() -> None:
    world = World()
    world.produce_many(60)
    worker = world.worker()
    rng = random.Random(7)
    snapshots = [world.store.copy()]

    def back(name: str) -> None:
        if name == "after save":
            snapshots.append(world.store.copy())
        if rng.random() < 0.03 and len(snapshots) < 60:
            world.store.restore(rng.choice(snapshots))

    world.interrupt(back)
    finish(worker.run())
    produce_everywhere(world)
    read_on(world)

    world.assert_all_applied()


def test_a_chunk_past_the_watermark_is_dropped_and_the_log_read_back() -> None:
    # Without alerts and dead letters: the commit below claims that they were published.
    never = DecisionThresholds(review=1.0, decline=1.0)
    world = World(small_checkpoint().with_header(thresholds=never), topic_partitions=1)
    for i in range(30):
        world.produce(f"A{i % 6}")
    one_poll(world.worker(), 10)
    assert world.watermark(0) == 10
    world.kafka.commit("recur", "transactions", 0, 20, world.kafka.join("recur", "transactions", 0))
    worker = world.worker()

    poll = one_poll(worker)

    assert poll.applied == {}
    assert world.watermark(0) == 10
    assert poll.chunks[0].begin == 20
    following = worker.consumer.poll()
    assert following is not None
    assert following.chunks[0].begin == 10
    finish(worker.process(following))
    finish(worker.run())
    world.assert_all_applied()


def test_a_poll_in_flight_behind_a_seek_is_dropped_without_another_seek() -> None:
    world = World(topic_partitions=1)
    world.produce_many(40)
    worker = world.worker()
    one_poll(worker)
    in_flight = [worker.consumer.poll(8), worker.consumer.poll(8)]
    lose_everything(world)
    seeks: list[str] = []
    world.interrupt(note(seeks, "before seek"))

    for poll in in_flight:
        assert poll is not None
        finish(worker.process(poll))
        assert poll.applied == {}

    assert len(seeks) == 1
    finish(worker.run())
    world.assert_all_applied()


def test_another_model_starts_without_states_and_keeps_published_scores() -> None:
    world = small_world()
    read_on(world)
    before = {p: world.scores(p) for p in world.partitions}
    lose_everything(world)  # another digest uses other keys
    alerts = world.alerts()
    produce_everywhere(world)

    worker = read_on(world, checkpoint=small_checkpoint(seed=5))

    for partition, scores in before.items():
        after = world.scores(partition)
        assert {offset: after[offset] for offset in scores} == scores
        assert len(after) == len(scores) + 1
    after_alerts = world.alerts()
    assert {source: after_alerts[source] for source in alerts} == alerts
    assert worker.count("recur_scores_recovered_total") == sum(map(len, before.values()))
    for partition in world.partitions:
        assert world.watermark(partition) == world.kafka.bounds("transactions", partition).end
