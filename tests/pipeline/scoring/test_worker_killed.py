"""A worker killed at any step: nothing is lost and no score is published twice."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from pipeline.messages.decision import DecisionThresholds
from pipeline.messages.scores import decode_alert
from pipeline.scoring import recovery as recovery_module
from tests.fakes import memory as memory_module
from tests.fakes.memory_workers import (
    Killed,
    World,
    finish,
)
from tests.pipeline.scoring.helpers import (
    count_steps,
    die,
    kill_at,
    kill_repeatedly,
    nothing,
    read_on,
    run_until_killed,
    small_world,
    when,
    when_nth,
)
from tests.seeds import seeds

pytestmark = pytest.mark.usefixtures("no_waits")


def test_a_published_score_keeps_its_decision_and_its_alert_its_thresholds() -> None:
    world = World(topic_partitions=1, review_threshold=0.0, decline_threshold=1.0)
    world.produce("A")
    world.interrupt(when_nth("before save", 1, die))  # the first save is of the first watermark
    run_until_killed(world.worker())
    world.interrupt(nothing)
    assert world.scores(0)
    assert world.watermark(0) == 0

    second = world.worker()
    second.processor.use(DecisionThresholds(1.0, 1.0))
    finish(second.run())

    for record in world.kafka.records("alerts"):
        alert = decode_alert(record.value or b"")
        assert alert.decision == "review"
        assert alert.thresholds == {"review": 0.0, "decline": 1.0}
    assert world.alerts() == {"transactions:0:0": 2}


@pytest.mark.parametrize("number", range(count_steps()))
def test_a_worker_killed_at_any_step_loses_nothing_and_publishes_no_score_twice(
    number: int,
) -> None:
    world = small_world()
    kill_at(world, number)

    worker = read_on(world)

    world.assert_all_applied()
    assert worker.count("recur_watermark_conflicts_total") == 0
    assert worker.count("recur_records_lost_total") == 0


@pytest.mark.parametrize("seed", seeds(25))
def test_workers_killed_repeatedly_lose_nothing_and_publish_no_score_twice(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are killed during recovery, too, and read published scores in pieces."""
    monkeypatch.setattr(recovery_module, "RECOVERY_LOOKAHEAD", 3)
    monkeypatch.setattr(memory_module, "FETCH_RECORDS", 2)
    rng = random.Random(seed)
    world = World(micro_batch_max=rng.choice([3, 8, 30]))
    world.produce_many(60, seed=seed)
    kill_repeatedly(world, rng)

    read_on(world)

    world.assert_all_applied()


def test_published_scores_stay_as_they_are_after_a_kill() -> None:
    """A published score stands, even if the next worker computes another one."""
    world = small_world()
    world.interrupt(when_nth("before save", 4, die))
    run_until_killed(world.worker())
    before = {p: world.scores(p) for p in world.partitions}
    unsaved = sum(offset >= world.watermark(p) for p, scores in before.items() for offset in scores)
    assert unsaved > 0

    worker = read_on(world)

    for partition, scores in before.items():
        after = world.scores(partition)
        assert {offset: after[offset] for offset in scores} == scores
    assert worker.count("recur_scores_recovered_total") == unsaved


def test_alerts_are_published_if_the_worker_died_after_the_scores() -> None:
    world = World(topic_partitions=1, review_threshold=0.0)
    for _ in range(5):
        world.produce("A")
    world.interrupt(when("before publish alerts", die))
    run_until_killed(world.worker())
    assert len(world.scores(0)) == 5
    assert not world.alerts()

    read_on(world)

    assert sorted(world.alerts().values()) == [1] * 5


def test_alerts_published_after_a_kill_have_the_same_reasons() -> None:
    """The reasons use the hidden state before the transaction, as the log determines it."""
    reasons = []
    for interrupt in (nothing, when("before publish alerts", die)):
        world = World(topic_partitions=1, review_threshold=0.0)
        for amount in (20.0, 500.0, 20.0, 30.0, 900.0):
            world.produce("A", amount=amount)
        world.interrupt(interrupt)
        with suppress(Killed):
            finish(world.worker().run())
        read_on(world)
        alerts = [decode_alert(r.value or b"") for r in world.kafka.records("alerts")]
        reasons.append([[reason.code for reason in alert.reasons] for alert in alerts])

    assert reasons[0] == reasons[1]
    assert len(reasons[0]) == 5
