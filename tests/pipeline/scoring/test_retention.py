"""Records that retention deletes before they are applied."""

from __future__ import annotations

import pytest

from tests.fakes.memory_workers import (
    World,
    finish,
)
from tests.pipeline.scoring.helpers import lose_everything, one_poll, produce_everywhere, read_on

pytestmark = pytest.mark.usefixtures("no_waits")


def test_records_that_retention_deleted_before_they_were_applied_are_counted() -> None:
    world = World(topic_partitions=1)
    for _ in range(40):
        world.produce("A")
    worker = world.worker()
    one_poll(worker)
    assert world.watermark(0) == 8

    world.kafka.delete_records("transactions", 0, 25)
    finish(worker.run())

    assert worker.count("recur_records_lost_total") == 17
    assert world.watermark(0) == 40
    assert sorted(world.scores(0)) == [*range(8), *range(25, 40)]


def test_records_lost_while_no_worker_ran_are_counted() -> None:
    world = World(topic_partitions=1)
    for _ in range(40):
        world.produce("A")
    one_poll(world.worker())
    world.kafka.delete_records("transactions", 0, 25)

    worker = read_on(world)

    assert worker.count("recur_records_lost_total") == 17
    assert sorted(world.scores(0)) == [*range(8), *range(25, 40)]


def test_a_log_deleted_up_to_the_watermark_loses_no_records() -> None:
    world = World(topic_partitions=1)
    for _ in range(40):
        world.produce("A")
    one_poll(world.worker())
    world.kafka.delete_records("transactions", 0, 8)

    worker = read_on(world)

    assert worker.count("recur_records_lost_total") == 0
    assert sorted(world.scores(0)) == list(range(40))


def test_a_replay_works_without_scores_that_retention_deleted() -> None:
    world = World(topic_partitions=1)
    world.produce_many(40)
    read_on(world)
    world.kafka.delete_records("scores", 0, 10)
    left = world.scores(0)
    lose_everything(world)
    produce_everywhere(world)

    read_on(world)

    world.assert_all_applied()
    assert {offset: world.scores(0)[offset] for offset in left} == left
