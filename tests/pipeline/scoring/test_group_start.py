"""Where a new consumer group starts."""

from __future__ import annotations

import pytest

from tests.fakes.memory_workers import (
    World,
    finish,
)
from tests.pipeline.scoring.helpers import die, read_on, run_until_killed, when_nth

pytestmark = pytest.mark.usefixtures("no_waits")


@pytest.mark.parametrize(("reset", "scored"), [("earliest", 20), ("latest", 10)])
def test_a_new_group_starts_where_its_reset_policy_says(reset: str, scored: int) -> None:
    world = World(topic_partitions=1, kafka_auto_offset_reset=reset)
    for _ in range(10):
        world.produce("A")
    worker = world.worker()
    for _ in range(10):
        world.produce("A")

    finish(worker.run())

    assert sorted(world.scores(0)) == list(range(20 - scored, 20))
    assert worker.count("recur_records_lost_total") == 0


def test_a_group_that_dies_before_its_first_commit_continues_from_its_watermark() -> None:
    world = World(topic_partitions=1, kafka_auto_offset_reset="latest")
    worker = world.worker()
    for _ in range(20):
        world.produce("A")
    world.interrupt(when_nth("after save", 1, die))
    run_until_killed(worker)
    assert world.kafka.committed("recur", "transactions", 0) is None
    for _ in range(5):
        world.produce("A")

    read_on(world)
    world.produce("A")  # this record makes the worker find its states
    worker = read_on(world)
