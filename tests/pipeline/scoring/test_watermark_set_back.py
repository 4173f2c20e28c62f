"""A watermark set back by `recur state rebuild` while workers run."""

from __future__ import annotations

import random

import pytest

from pipeline.admin.rebuild_states import PartitionRebuild
from tests.fakes.memory_workers import (
    World,
    finish,
)
from tests.pipeline.scoring.helpers import Simulation, produce_everywhere, read_on, rebuild
from tests.seeds import seeds

pytestmark = pytest.mark.usefixtures("no_waits")


@pytest.mark.parametrize("seed", seeds(40))
def test_a_rebuild_repairs_states_beside_running_workers(seed: int) -> None:
    """The watermark is set back repeatedly, between any two steps of the workers.

    Nothing deletes the states past it, but no worker uses them.
    """
    rng = random.Random(seed)
    simulation = Simulation(seed, workers_max=rng.choice([1, 3]))
    world = simulation.world
    taken: list[PartitionRebuild | None] = []

    def act() -> None:
        taken.append(rebuild(world, rng.choice(world.partitions)))

    simulation.also = (0.03, act)
    simulation.run()
    act()
    produce_everywhere(world)

    read_on(world)

    assert any(taken)
    world.assert_all_applied(scores_once=False)


def test_a_rebuild_repairs_damaged_states_and_publishes_no_score_twice() -> None:
    """Accounts that are not in the log keep their states."""
    world = World(topic_partitions=1)
    world.produce_many(60)
    world.produce("gone")
    worker = world.worker()
    finish(worker.run())
    scores, alerts = world.scores(0), world.alerts()
    states = world.store.states
    right = dict(states)
    accounts = sorted(account for _, account in states if account != "gone")
    states[0, accounts[0]] = states[0, accounts[1]]
    states[0, accounts[2]] = states[0, accounts[2]][:-1] + b"x"
    del states[0, accounts[3]]

    plan = rebuild(world, 0)
    produce_everywhere(world)
    finish(worker.run())

    assert plan is not None
    assert (plan.begin, plan.end) == (0, world.watermark(0) - 1)
    world.assert_all_applied()
    assert states.keys() >= right.keys()
    assert {offset: world.scores(0)[offset] for offset in scores} == scores
    assert {source: world.alerts()[source] for source in alerts} == alerts


def test_a_rebuild_keeps_states_of_accounts_that_left_the_log() -> None:
    world = World(topic_partitions=1)
    for account in ("old", "both", "both", "new"):
        world.produce(account)
    worker = world.worker()
    finish(worker.run())
    before = dict(world.store.states)
    world.kafka.delete_records("transactions", 0, before=2)

    plan = rebuild(world, 0)
    assert plan is not None
    assert (plan.begin, plan.end) == (2, 4)
    world.produce("old")
    finish(worker.run())

    decode = worker.scorer.codec.decode
    first = {
        account: int(decode([value])[0].first_offset[0])
        for (_, account), value in world.store.states.items()
    }
    assert first == {"old": 0, "both": 2, "new": 3}
    assert world.store.states[0, "new"] == before[0, "new"]
    assert worker.count("recur_records_lost_total") == 0


def test_a_rebuild_does_nothing_without_a_watermark() -> None:
    world = World(topic_partitions=1)
    world.produce("A")

    assert rebuild(world, 0) is None

    assert not world.store.watermarks
    read_on(world)
    world.assert_all_applied()
