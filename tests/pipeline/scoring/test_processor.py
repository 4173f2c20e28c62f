"""The processor on a broker and a store in memory: whatever dies, nothing is lost or said twice."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from model.checkpoint import Checkpoint
from model.features.account import FEATURES
from model.reasons import REASONS_MAX
from pipeline.admin.rebuild_states import WatermarksSetBack
from pipeline.errors import StartupError
from pipeline.kafka.polls import Chunk, Poll
from pipeline.kafka.producer import AppendResult, Outgoing, PublishError
from pipeline.messages.control import CONTROL_HEADER
from pipeline.messages.decision import DecisionThresholds, thresholds_of
from pipeline.messages.scores import Score, decode_alert, decode_score
from pipeline.messages.transactions import WARM_HEADER
from pipeline.scoring import recovery as recovery_module
from pipeline.scoring import retry as patience_module
from pipeline.scoring import topic_id_cache
from pipeline.scoring.dead_letter import LOG_EVERY_MS, DeadLetters
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.scorer import FAILURES_IN_A_ROW_MAX, ScorerBrokenError
from pipeline.settings import load_settings
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import NO_ID
from tests.fakes import memory as memory_module
from tests.fakes.memory import MemoryProducer, MemoryRecord, MemoryStateStore
from tests.fakes.memory_workers import (
    DAY_MS,
    START_MS,
    Killed,
    MemoryWorker,
    World,
    finish,
    small_checkpoint,
    step,
)
from tests.seeds import seeds

POISON = 666.0

REASON_TOLERANCE = 0.02
"""Of a weight: micro-batches of other sizes give other last bits."""


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retrier asks again at once: no test here has an event loop that could wait."""
    monkeypatch.setattr(patience_module, "RETRY_SECONDS", (0,))


def at(number: int, act: Callable[[], object]) -> Callable[[str], None]:
    """Do something at the n-th step."""
    steps = iter(range(number + 1))

    def interrupt(name: str) -> None:
        if next(steps, None) == number:
            act()

    return interrupt


def when(name: str, act: Callable[[], object], times: int = 1) -> Callable[[str], None]:
    """Do something at the first steps of this name."""
    left = iter(range(times))

    def interrupt(step_name: str) -> None:
        if step_name == name and next(left, None) is not None:
            act()

    return interrupt


def nothing(name: str) -> None:
    """Every step happens."""


def die() -> None:
    raise Killed


def run_until_killed(worker: MemoryWorker) -> None:
    with pytest.raises(Killed):
        finish(worker.run())


def next_poll(worker: MemoryWorker, records_max: int | None = None) -> Poll:
    poll = worker.consumer.poll(records_max)
    assert poll is not None
    return poll


def one_poll(worker: MemoryWorker, records_max: int | None = None) -> Poll:
    """Process the next poll alone."""
    poll = next_poll(worker, records_max)
    finish(worker.process(poll))
    return poll


def lose_everything(world: World) -> None:
    """The store is empty, as another Redis or another model's keys are."""
    world.store.watermarks.clear()
    world.store.states.clear()


def produce_everywhere(world: World) -> None:
    """A transaction in each partition: without any, nobody looks at its states."""
    for partition in world.partitions:
        world.produce(world.account_in(partition))


def read_on(world: World, **settings: Any) -> MemoryWorker:
    """A fresh worker that works to the end of the log."""
    world.interrupt(nothing)
    worker = world.worker(**settings)
    finish(worker.run())
    return worker


# a clean run -----------------------------------------------------------------------------


def test_the_steps_of_a_poll_come_in_their_order() -> None:
    world = World(topic_partitions=1)
    worker = world.worker()
    world.produce("A", amount=1.0)
    one_poll(worker)
    steps: list[str] = []
    world.interrupt(steps.append)
    world.produce_raw(b"A", b"not a transaction")
    for amount in (300.0, 0.01):
        world.produce("A", amount=amount)
    committed = world.kafka.committed("recur", "transactions", 0)

    one_poll(worker)

    names = ["load", "publish scores", "publish alerts", "publish rejected"]
    names += ["add to merchants", "save"]  # what labels need to know comes before the states
    if not world.alerts():
        names.remove("publish alerts")
    assert steps == [f"{when} {name}" for name in names for when in ("before", "after")]
    assert committed == 1
    assert world.kafka.committed("recur", "transactions", 0) == 4


@pytest.mark.parametrize("polls_waiting", [0, 1])
@pytest.mark.parametrize("records_max", [1, 7, 1000])
def test_a_clean_run_scores_and_applies_every_transaction_once(
    polls_waiting: int, records_max: int
) -> None:
    world = World()
    world.produce_many(120)
    worker = world.worker()

    finish(worker.run(polls_waiting, records_max))

    world.assert_all_applied(alerts_once=True)
    expected = world.references()
    scored = sum(len(part.scores) for part in expected)
    assert worker.count("recur_transactions_total") == scored
    assert worker.count("recur_fraud_score_count") == scored
    assert worker.count("recur_score_latency_seconds_count") == scored
    repeats = sum(len(part.repeated) for part in expected)
    assert worker.count("recur_duplicate_transactions_total") == repeats > 0
    rejected = sum(len(part.rejected) for part in expected)
    assert worker.count("recur_rejected_total", reason="not_json") == rejected > 0
    alerts = [
        worker.count("recur_alerts_total", decision=decision) for decision in ("review", "decline")
    ]
    assert sum(alerts) == len(world.alerts()) > 0
    for name in ("replayed", "scores_recovered", "guard_mismatches", "foreign_scores"):
        assert worker.count(f"recur_{name}_total") == 0
    for partition in world.partitions:
        assert world.kafka.committed("recur", "transactions", partition) == world.watermark(
            partition
        )


def test_two_workers_share_the_partitions() -> None:
    world = World(topic_partitions=3)
    world.produce_many(90)
    first, second = world.worker([0, 2]), world.worker([1])

    finish(first.run())
    finish(second.run())

    world.assert_all_applied(alerts_once=True)


def test_a_score_holds_what_the_topic_promises() -> None:
    world = World(topic_partitions=1)
    world.produce('A "1"%é', "t-1", amount=300.5, merchant_id="m-9", category="5411")

    read_on(world)

    ((value,),) = world.scores(0).values()
    score = decode_score(value)
    assert (score.transaction_id, score.account_id, score.merchant_id) == ("t-1", 'A "1"%é', "m-9")
    assert (score.amount, score.timestamp) == (300.5, world.now_ms)
    assert (score.model, score.source) == (world.checkpoint.digest, "transactions:0:0")
    assert score.features["amount"] == 300.5
    assert score.features["transactions_seen"] == 1
    raw = np.array([score.raw(FEATURES)], np.float32)
    network = world.checkpoint.network
    logits, _ = network.step(
        torch.from_numpy(world.checkpoint.encode(raw)), network.empty_hidden(1)
    )
    assert np.float32(score.score) == logits.sigmoid().numpy()[0], "cannot be recomputed"


def test_an_alert_holds_its_score_thresholds_and_time() -> None:
    world = World(topic_partitions=1, review_threshold=0.0, decline_threshold=1.0)
    world.produce("A")

    read_on(world)

    (record,) = world.kafka.records("alerts")
    alert = decode_alert(record.value or b"")
    assert record.key == b"A"
    assert alert.decision == "review"
    assert alert.thresholds == {"review": 0.0, "decline": 1.0}
    assert alert.created_at == world.now_ms
    assert 1 <= len(alert.reasons) <= REASONS_MAX
    assert sum(reason.weight for reason in alert.reasons) == pytest.approx(1.0)
    ((value,),) = world.scores(0).values()
    assert alert.score == decode_score(value).score


def test_new_thresholds_decide_from_the_next_micro_batch_on() -> None:
    """Each alert says which thresholds decided, and none comes that they did not ask for."""
    world = World(topic_partitions=1, review_threshold=1.0, decline_threshold=1.0)
    worker = world.worker()
    world.produce("A")
    finish(worker.run())
    assert not world.alerts()

    worker.processor.use(DecisionThresholds(0.0, 0.001))
    world.produce("A")
    finish(worker.run())

    (record,) = world.kafka.records("alerts")
    alert = decode_alert(record.value or b"")
    assert (alert.source, alert.decision) == ("transactions:0:1", "decline")
    assert alert.thresholds == {"review": 0.0, "decline": 0.001}
    assert worker.count("recur_threshold", decision="review") == 0.0
    assert worker.count("recur_threshold", decision="decline") == 0.001


def test_a_kept_score_keeps_its_decision_and_its_alert_the_thresholds_that_decided() -> None:
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


# killed at any step ----------------------------------------------------------------------


def small_world(**settings: Any) -> World:
    world = World(**settings)
    world.produce_many(36)
    return world


def count_steps(**settings: Any) -> int:
    world = small_world(**settings)
    steps: list[str] = []
    world.interrupt(steps.append)
    finish(world.worker().run())
    return len(steps)


@pytest.mark.parametrize("number", range(count_steps()))
def test_a_worker_killed_at_any_step_loses_nothing_and_says_nothing_twice(number: int) -> None:
    world = small_world()
    world.interrupt(at(number, die))
    run_until_killed(world.worker())
    world.assert_published_before_saved()

    worker = read_on(world)

    world.assert_all_applied()
    assert worker.count("recur_watermark_conflicts_total") == 0
    assert worker.count("recur_records_lost_total") == 0


@pytest.mark.parametrize("seed", seeds(25))
def test_workers_killed_again_and_again_lose_nothing_and_say_nothing_twice(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while they recover, and with published scores that are read piece by piece."""
    monkeypatch.setattr(recovery_module, "RECOVERY_LOOKAHEAD", 3)
    monkeypatch.setattr(memory_module, "FETCH_RECORDS", 2)
    rng = random.Random(seed)
    world = World(micro_batch_max=rng.choice([3, 8, 30]))
    world.produce_many(60, seed=seed)
    for _ in range(100):
        world.interrupt(at(rng.randrange(30), die))
        try:
            finish(world.worker().run(choose=rng.choice))
        except Killed:
            world.assert_published_before_saved()
        else:
            break

    read_on(world)

    world.assert_all_applied()


def test_after_a_kill_published_scores_are_kept_as_they_were_said() -> None:
    """Even if the next worker would say something else: the score that is out stands."""
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


def when_nth(name: str, number: int, act: Callable[[], object]) -> Callable[[str], None]:
    """Do something at the n-th step of this name."""
    left = iter(range(number + 1))

    def interrupt(step_name: str) -> None:
        if step_name == name and next(left, None) == number:
            act()

    return interrupt


def test_alerts_of_scores_whose_worker_died_between_the_two_are_published() -> None:
    world = World(topic_partitions=1, review_threshold=0.0)
    for _ in range(5):
        world.produce("A")
    world.interrupt(when("before publish alerts", die))
    run_until_killed(world.worker())
    assert len(world.scores(0)) == 5
    assert not world.alerts()

    read_on(world)

    assert sorted(world.alerts().values()) == [1] * 5


def test_alerts_raised_again_have_the_reasons_that_they_would_have_had() -> None:
    """Of the hidden before each one, as the log makes it, and of nothing that came later."""
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


def test_reasons_are_of_the_state_before_the_transaction_whatever_the_micro_batch() -> None:
    """A micro-batch of many gives the reasons that as many of one give."""
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


# other writers ---------------------------------------------------------------------------


def save_elsewhere(world: World, partition: int, watermark: Watermark) -> None:
    """What another worker's save leaves."""
    world.store.watermarks[partition] = watermark.to_bytes()


def test_a_save_that_meets_another_watermark_writes_nothing_and_goes_on_from_it() -> None:
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


def test_what_another_worker_has_applied_is_dropped_and_acked() -> None:
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
        if name != "before save":  # that of the first watermark
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


def test_a_partition_given_back_while_it_is_worked_on_is_not_acked_by_the_old_poll() -> None:
    world = World(topic_partitions=1)
    world.produce_many(30)
    worker = world.worker()
    poll = next_poll(worker)
    world.interrupt(when("before publish scores", lambda: worker.rebalance([0])))

    finish(worker.process(poll))
    assert poll.applied == {}

    finish(worker.run())
    world.assert_all_applied(alerts_once=False)


def test_another_worker_that_writes_the_first_watermark_meanwhile_is_followed() -> None:
    """Its states are not those that were loaded before it began: they were none."""
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


def test_scores_of_another_worker_between_ones_own_are_counted_and_stay_the_first() -> None:
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
        assert first.score == 0.125, "the first one published is the valid one"
        assert second.score != 0.125


def publish_as_zombie(world: World, start: int, stop: int, number: float = 0.125) -> None:
    """Scores of transactions in [start, stop), whether there are such or not."""
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


def test_foreign_scores_of_transactions_to_come_are_kept_and_not_said_again() -> None:
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
        assert len(scores[offset]) == 1, "said again although another had said it"
    for offset in (6, 7):
        assert len(scores[offset]) == 2, "both were under way at the same time"
    assert worker.count("recur_scores_recovered_total") == 3


def test_a_zombies_save_that_wins_does_not_hide_what_the_owner_published() -> None:
    """The owner has said more than the zombie, and the zombie's save comes first."""
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


def note(names: list[str], name: str) -> Callable[[str], None]:
    """Write down each step of this name."""

    def interrupt(step_name: str) -> None:
        if step_name == name:
            names.append(step_name)

    return interrupt


class Simulation:
    """Workers that all think they own everything, killed and overtaken at any step.

    The group gives the partitions to each new worker; the old ones may hear of it or not. The
    store may go back to what it was.
    """

    def __init__(self, seed: int, workers_max: int, **settings: Any) -> None:
        self._workers_max = workers_max
        rng = self.rng = random.Random(seed)
        self.world = World(
            topic_partitions=rng.choice([1, 2]),
            micro_batch_max=rng.choice([3, 8, 20]),
            state_cache_size=rng.choice([0, 1000]),
            **settings,
        )
        self.world.produce_many(50, seed=seed)
        self._snapshots = [self.world.store.copy()]
        self.also: tuple[float, Callable[[], None]] = 0.0, lambda: None  # done now and then
        self._alive: list[tuple[MemoryWorker, Coroutine[Any, Any, None]]] = []

    def run(self) -> World:
        """As many steps as the seed wants, and then all workers to their end."""
        for _ in range(self.rng.randrange(50, 400)):
            if not self._alive:
                self._start()
            self._act(self.rng.random())
        while self._alive:
            self._step()
        return self.world

    def _act(self, chance: float) -> None:
        share, act = self.also
        if share and self.rng.random() < share:
            act()
        if chance < 0.01 and len(self._alive) < self._workers_max:
            self._start()
        elif chance < 0.015:
            self._alive.pop(self.rng.randrange(len(self._alive)))[1].close()
        elif chance < 0.02:
            self.world.store.restore(self.rng.choice(self._snapshots))
        elif chance < 0.06:
            self._snapshots.append(self.world.store.copy())
        elif chance < 0.09:
            self.world.produce_many(2, seed=self.rng.randrange(1000))
        else:
            self._step()

    def _start(self) -> None:
        if self._alive and self.rng.random() < 0.5:
            self._alive[-1][0].rebalance([])
        worker = self.world.worker()
        self._alive.append((worker, worker.run(choose=self.rng.choice)))

    def _step(self) -> None:
        one = self.rng.choice(self._alive)
        if not step(one[1]):
            self._alive.remove(one)


@pytest.mark.parametrize("seed", seeds(50))
def test_whoever_overtakes_whom_every_transaction_is_applied_once_and_none_is_lost(
    seed: int,
) -> None:
    world = Simulation(seed, workers_max=3).run()
    produce_everywhere(world)

    read_on(world)

    world.assert_all_applied(scores_once=False)


@pytest.mark.parametrize("seed", seeds(30))
def test_one_worker_after_another_on_a_store_that_goes_back_says_nothing_twice(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_module, "RECOVERY_LOOKAHEAD", 3)
    monkeypatch.setattr(memory_module, "FETCH_RECORDS", 2)
    world = Simulation(seed, workers_max=1).run()
    produce_everywhere(world)

    read_on(world)

    world.assert_all_applied()


# the store goes back ---------------------------------------------------------------------


@pytest.mark.parametrize("lose", ["everything", "half"])
@pytest.mark.parametrize("alive", [True, False], ids=["worker alive", "new worker"])
def test_a_store_that_went_back_is_rebuilt_and_no_score_that_exists_is_published(
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


def test_a_store_that_lost_a_partition_between_load_and_save_is_rebuilt() -> None:
    world = World(topic_partitions=1)
    world.produce_many(50)
    worker = world.worker()
    one_poll(worker)

    world.interrupt(when_nth("before save", 1, lambda: lose_everything(world)))
    finish(worker.run())

    world.assert_all_applied()
    assert worker.count("recur_watermark_conflicts_total") >= 1


def test_a_store_that_loses_all_before_the_groups_first_commit_is_no_new_beginning() -> None:
    """Neither for the save that meets it, nor for the poll that is computed meanwhile."""
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
def test_a_poll_that_outlives_its_assignment_is_no_new_beginning(kept: list[int]) -> None:
    """The group has committed nothing, and the store has lost where this worker began: its
    states would begin where the poll does, and what is before it would never be applied.
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


def test_a_store_that_goes_back_again_and_again_is_rebuilt() -> None:
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


def test_a_chunk_past_the_watermark_is_not_applied_but_the_log_read_back() -> None:
    # No alerts and rejections: of what is committed, as here by hand, they were published.
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


def test_another_model_begins_anew_and_keeps_the_scores_that_were_said() -> None:
    world = small_world()
    read_on(world)
    before = {p: world.scores(p) for p in world.partitions}
    lose_everything(world)  # another digest has keys of its own
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


# where a group begins --------------------------------------------------------------------


@pytest.mark.parametrize(("reset", "scored"), [("earliest", 20), ("latest", 10)])
def test_a_new_group_begins_by_its_reset_policy(reset: str, scored: int) -> None:
    world = World(topic_partitions=1, kafka_auto_offset_reset=reset)
    for _ in range(10):
        world.produce("A")
    worker = world.worker()
    for _ in range(10):
        world.produce("A")

    finish(worker.run())

    assert sorted(world.scores(0)) == list(range(20 - scored, 20))
    assert worker.count("recur_records_lost_total") == 0


def test_a_group_that_begins_late_and_dies_before_its_first_commit_goes_on_where_it_was() -> None:
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
    world.produce("A")  # what comes in makes the reader see that it is past the states
    worker = read_on(world)


# retention -------------------------------------------------------------------------------


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


def test_a_log_deleted_up_to_the_watermark_has_lost_nothing() -> None:
    world = World(topic_partitions=1)
    for _ in range(40):
        world.produce("A")
    one_poll(world.worker())
    world.kafka.delete_records("transactions", 0, 8)

    worker = read_on(world)

    assert worker.count("recur_records_lost_total") == 0
    assert sorted(world.scores(0)) == list(range(40))


def test_scores_that_retention_deleted_are_no_obstacle_to_a_replay() -> None:
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


# states and log that do not belong together ----------------------------------------------


@pytest.mark.parametrize(
    ("watermark", "message"),
    [
        (Watermark(8, 0, 0, 1).to_bytes(), "had 8 partitions; it has 1.*RECUR_REDIS_KEY_PREFIX"),
        (
            Watermark(1, 9, 0, 1).to_bytes(),
            "past the end of transactions-0.*RECUR_REDIS_KEY_PREFIX",
        ),
        (b"of a version to come", "watermark of transactions-0.*RECUR_REDIS_KEY_PREFIX"),
    ],
    ids=["partition count", "log recreated", "format"],
)
def test_states_that_do_not_belong_to_the_log_end_the_worker_with_what_to_do(
    watermark: bytes, message: str
) -> None:
    world = World(topic_partitions=1)
    for _ in range(5):
        world.produce("A")
    world.store.watermarks[0] = watermark

    with pytest.raises(StartupError, match=message):
        finish(world.worker().run())

    assert world.scores(0) == {}
    assert world.store.watermarks == {0: watermark}


def test_a_scores_topic_that_was_recreated_is_no_reason_to_forget_where_ones_scores_are() -> None:
    world = World(topic_partitions=1)
    for _ in range(20):
        world.produce("A")
    save_elsewhere(world, 0, Watermark(1, 0, scores_offset=10**6, writer=1))
    world.interrupt(when_nth("before save", 0, die))
    run_until_killed(world.worker())
    assert len(world.scores(0)) == 8

    read_on(world)

    world.assert_all_applied()


@pytest.mark.parametrize("is_emptied", [False, True], ids=["went back", "emptied"])
def test_what_a_group_committed_of_a_log_before_hides_no_alert_though_redis_lost_data(
    is_emptied: bool,
) -> None:
    """A late commit is further than the watermark tells that the log before was worked on."""
    world = World(topic_partitions=1, on_new_log="begin", review_threshold=0.0)
    world.produce("A")
    finish(world.worker().run())
    old = world.store.watermarks[0]
    for topic in ("transactions", "alerts"):
        world.kafka.recreate(world.settings.topic(topic))
    world.store.states.clear()
    if is_emptied:
        world.store.watermarks.clear()
    assert is_emptied or Watermark.from_bytes(old).next_offset == 1
    generation = world.kafka.join("recur", "transactions", 0)
    world.kafka.commit("recur", "transactions", 0, 4, generation)
    worker = world.worker()
    if is_emptied:  # given the partition, a worker looks at its watermark
        finish(worker.processor.process(Poll({0: Chunk(4, 4, [])})))
    for _ in range(6):
        world.produce("A")

    finish(worker.run())

    assert world.alerts() == {f"transactions:0:{offset}": 1 for offset in range(6)}


# services away ---------------------------------------------------------------------------


def test_a_store_that_is_away_is_waited_for_and_nothing_is_lost() -> None:
    world = World(topic_partitions=1)
    world.produce_many(40)
    worker = world.worker()
    seen: list[bool] = []

    def go_away(name: str) -> None:
        if name.startswith("before") and name.split()[1] in ("load", "save") and len(seen) < 12:
            world.store.is_up = not world.store.is_up
            seen.append(worker.health.ready)

    for part in ("redis", "kafka", "partitions"):
        worker.health.up(part)
    world.interrupt(go_away)
    finish(worker.run())

    world.assert_all_applied(alerts_once=True)
    assert worker.count("recur_redis_errors_total") > 0
    assert False in seen, "not ready while it is away"
    assert worker.health.ready


def test_a_broker_that_does_not_answer_is_waited_for() -> None:
    world = World(topic_partitions=1)
    world.produce_many(20)
    worker = world.worker()

    def go_away(name: str) -> None:
        if name in ("before committed", "before bounds", "before read scores"):
            world.kafka.is_up = not world.kafka.is_up

    world.interrupt(go_away)
    finish(worker.run())

    world.assert_all_applied(alerts_once=True)
    assert worker.count("recur_kafka_errors_total") > 0


def test_when_nothing_can_be_published_the_worker_ends_with_nothing_saved() -> None:
    world = World(topic_partitions=1)
    world.produce_many(20)
    worker = world.worker()
    one_poll(worker)
    watermark = world.watermark(0)
    world.interrupt(when("before publish scores", lambda: setattr(world.kafka, "is_up", False)))

    with pytest.raises(PublishError):
        finish(worker.run())

    assert world.watermark(0) == watermark
    world.kafka.is_up = True
    read_on(world)
    world.assert_all_applied(alerts_once=True)


def test_an_unknown_base_offset_is_looked_up() -> None:
    """A batch that was repeated because its first answer was lost tells no offset."""
    world = World(topic_partitions=1)
    world.produce_many(40)

    class Forgetful(MemoryProducer):
        async def publish(
            self,
            scores: dict[int, Sequence[Outgoing]],
            alerts: Sequence[Outgoing],
            rejected: Sequence[Outgoing],
        ) -> dict[int, AppendResult]:
            appended = await super().publish(scores, alerts, rejected)
            return dict.fromkeys(appended, AppendResult(None, None))

    worker = world.worker()
    worker.processor._publisher = Forgetful(world.kafka, world.settings)
    world.interrupt(when_nth("before save", 3, die))
    run_until_killed(worker)

    read_on(world)

    world.assert_all_applied()


# a watermark that is taken back ------------------------------------------------------------


def rebuild(world: World, partition: int) -> WatermarksSetBack | None:
    """What `recur state rebuild` does to a partition, at one moment."""
    plan: WatermarksSetBack | None = finish(world.rebuild().take_back(partition))
    return plan


@pytest.mark.parametrize("seed", seeds(40))
def test_states_are_rebuilt_whatever_workers_do_meanwhile(seed: int) -> None:
    """The watermark is taken back again and again, between any two steps of the workers; what
    stands past it never gets into a state again, although nothing deletes it.
    """
    rng = random.Random(seed)
    simulation = Simulation(seed, workers_max=rng.choice([1, 3]))
    world = simulation.world
    taken: list[WatermarksSetBack | None] = []

    def act() -> None:
        taken.append(rebuild(world, rng.choice(world.partitions)))

    simulation.also = (0.03, act)
    simulation.run()
    act()
    produce_everywhere(world)

    read_on(world)

    assert any(taken)
    world.assert_all_applied(scores_once=False)


def test_a_rebuild_mends_states_and_says_nothing_again() -> None:
    """Of whatever kind the damage is; accounts that the log does not have stay as they are."""
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


def test_what_the_log_has_no_more_keeps_its_state_in_a_rebuild() -> None:
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


def test_a_log_that_begins_anew_is_scored_anew_after_a_rebuild() -> None:
    """The topic was recreated: the offsets of scores that are out mean other transactions."""
    world = World(topic_partitions=1)
    for _ in range(10):
        world.produce("A")
    finish(world.worker().run())
    world.kafka.recreate("transactions")
    world.produce("A", "t-new")
    with pytest.raises(
        StartupError, match=r"topic id \S+ then, \S+ now.*recur state rebuild --new-log"
    ):
        finish(world.worker().run())

    assert rebuild(world, 0) == WatermarksSetBack(0, 0, 1)
    read_on(world)

    first, second = world.scores(0)[0]
    assert decode_score(second).transaction_id == "t-new"
    assert decode_score(second).features["transactions_seen"] == 1
    assert decode_score(first).transaction_id != "t-new"


@pytest.mark.parametrize("count", [5, 10, 25], ids=["shorter", "as long", "longer"])
@pytest.mark.parametrize("runs_on", [True, False])
@pytest.mark.parametrize("policy", ["stop", "begin"])
def test_nothing_of_a_log_that_was_made_again_is_skipped(
    count: int, runs_on: bool, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a worker that starts, and by one that works on the partition as if nothing had been."""
    monkeypatch.setattr(topic_id_cache, "MAX_AGE_SECONDS", 0.0)
    world = World(topic_partitions=1, on_new_log=policy)
    for _ in range(10):
        world.produce("A")
    worker = world.worker()
    finish(worker.run())
    watermark = world.store.watermarks[0]
    world.kafka.recreate("transactions")
    for i in range(count):
        world.produce("A", f"new-{i}")

    async def go_on(worker: MemoryWorker) -> None:
        await worker.run()
        await worker.ownership.check_topic_id()  # where no record shows it
        await worker.run()

    if policy == "stop":
        with pytest.raises(StartupError, match=r"topic id \S+ then, \S+ now"):
            finish(go_on(worker if runs_on else world.worker()))
        assert world.store.watermarks[0] == watermark
        assert all(len(said) == 1 for said in world.scores(0).values())
        assert len(world.scores(0)) == 10
        return
    finish(go_on(worker if runs_on else world.worker()))

    said = [decode_score(value) for values in world.scores(0).values() for value in values]
    new = {s.transaction_id: s for s in said if s.transaction_id.startswith("new-")}
    assert len(said) == 10 + count
    assert sorted(new) == sorted(f"new-{i}" for i in range(count))
    assert new["new-0"].features["transactions_seen"] == 1
    assert new[f"new-{count - 1}"].features["transactions_seen"] == count
    assert world.watermark(0) == count


def test_scores_of_a_log_before_are_not_taken_for_those_of_the_new_one() -> None:
    """Redis has lost its data, and with them where the new log's scores begin."""
    world = World(topic_partitions=1, on_new_log="begin")
    for _ in range(10):
        world.produce("A")
    finish(world.worker().run())
    world.kafka.recreate("transactions")
    for i in range(10):
        world.produce("A", f"new-{i}")
    finish(world.worker().run())
    before = world.scores(0)
    world.store.restore(MemoryStateStore())
    world.produce("A", "newest")

    read_on(world)

    assert {k: v for k, v in world.scores(0).items() if k < 10} == before
    assert [len(values) for _, values in sorted(world.scores(0).items())] == [2] * 10 + [1]


def test_a_watermark_without_ids_adopts_those_that_it_finds() -> None:
    """An older version wrote it."""
    world = World(topic_partitions=1)
    for _ in range(10):
        world.produce("A")
    finish(world.worker().run())
    mark = Watermark.from_bytes(world.store.watermarks[0])
    old = struct.pack("<B3xIqqQ", 1, 1, mark.next_offset, mark.scores_offset, 7)
    world.store.watermarks[0] = old
    assert Watermark.from_bytes(old).log_id == NO_ID
    world.produce("A")

    read_on(world)

    found = Watermark.from_bytes(world.store.watermarks[0])
    assert found.log_id == mark.log_id != NO_ID
    assert (found.scores_log_id, found.next_offset) == (mark.scores_log_id, 11)
    world.assert_all_applied()


def test_without_a_watermark_there_is_nothing_to_take_back() -> None:
    world = World(topic_partitions=1)
    world.produce("A")

    assert rebuild(world, 0) is None

    assert not world.store.watermarks
    read_on(world)
    world.assert_all_applied()


# instructions ----------------------------------------------------------------------------


@pytest.mark.parametrize("records_max", [1, 2, 3, 100])
def test_an_account_that_is_forgotten_begins_anew_at_its_next_transaction(
    records_max: int,
) -> None:
    """Where the instruction stands in the account's order counts, wherever a poll is cut."""
    world = World(topic_partitions=1)
    for amount in (20.0, 500.0):
        world.produce("A", amount=amount)
    world.produce("B")
    _, forgotten = world.forget("A")
    world.produce("A", "again", amount=30.0)
    world.forget("A")
    world.produce("A", "again", amount=40.0)  # no repeat: the id is forgotten, too
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


def test_forgetting_is_not_undone_by_what_is_held_in_memory() -> None:
    """The next poll is computed before the state is deleted in the store."""
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


def test_an_instruction_that_was_applied_is_dropped_when_it_comes_again() -> None:
    """What the account did since stays, in the store and in the poll that comes again."""
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
    both = world.worker()  # a poll of what is applied and of what is not
    finish(both.process(Poll({0: Chunk(0, 5, world.kafka.records("transactions", 0))})))
    world.assert_all_applied(alerts_once=True)
    assert both.count("recur_accounts_forgotten_total") == 0


def test_of_an_account_whose_transactions_after_it_fail_nothing_is_left() -> None:
    world = World(topic_partitions=1)
    world.produce("A")
    world.forget("A")
    world.produce("A", amount=POISON)
    world.produce("B")

    read_on(world, checkpoint=Brittle())

    assert sorted(account for _, account in world.store.states) == ["B"]
    assert sorted(world.scores(0)) == [0, 3]


def test_an_instruction_to_look_changes_nothing() -> None:
    world = World(topic_partitions=1)
    world.produce("A")
    world.produce_raw(None, b"", [(CONTROL_HEADER, b"look")])
    world.produce("A")

    worker = read_on(world)

    assert world.watermark(0) == 3
    assert sorted(world.scores(0)) == [0, 2]
    assert not world.dead_letters()
    assert worker.count("recur_accounts_forgotten_total") == 0


# bad records -----------------------------------------------------------------------------


def test_rejected_records_go_to_dead_letter_with_reason_and_place_and_the_rest_goes_on() -> None:
    world = World(topic_partitions=1)
    world.produce("A")
    world.produce_raw(b"A", b"\xff junk")
    world.produce_raw(None, None)
    world.produce_raw(b"A", None)
    world.produce("A", timestamp=world.now_ms + 3 * DAY_MS)
    world.produce("A", timestamp="1969-12-31T23:59:59Z")
    world.produce("A", headers=[(CONTROL_HEADER, b"forget")])
    world.produce_raw(b"A", None, [(CONTROL_HEADER, b"remember")])
    world.produce_raw(b"A", None, [(CONTROL_HEADER, b"forget"), (CONTROL_HEADER, b"look")])
    world.produce_raw(None, None, [(CONTROL_HEADER, b"forget")])
    world.produce_raw(b"\xff", b"", [(CONTROL_HEADER, b"forget")])
    world.produce("A", amount=-1)
    world.produce_raw(b"B", b'{"transaction_id":"t"}')
    world.produce("A")

    worker = read_on(world)

    assert sorted(world.scores(0)) == [0, 13]
    assert world.watermark(0) == 14
    reasons = [
        "not_json",
        "null_value",
        "null_value",
        "future_timestamp",
        "timestamp",
        *["control"] * 5,
        "amount",
        "missing_field",
    ]
    log, dead = world.kafka.records("transactions"), world.kafka.records("dead-letter")
    assert len(dead) == len(reasons)
    for offset, (record, reason) in enumerate(zip(dead, reasons, strict=True), start=1):
        headers = {name: value.decode() for name, value in record.headers}
        error = headers.pop("error")
        assert 0 < len(error) <= 300
        assert headers == {
            "topic": "transactions",
            "partition": "0",
            "offset": str(offset),
            "reason": reason,
            "time": str(world.now_ms),
        }
        coordinates = f"transactions:0:{offset}".encode()
        assert record.key == (coordinates if log[offset].key is None else log[offset].key)
        assert record.value == log[offset].value
    for reason in set(reasons):
        assert worker.count("recur_rejected_total", reason=reason) == reasons.count(reason)


def test_the_log_tells_of_rejected_records_by_reason_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """So that one sees at once that all of a producer's are; without a word of what was sent."""
    now_ms = [0]
    letters = DeadLetters("transactions", 100, Metrics(CollectorRegistry()), lambda: now_ms[0])

    def reject(offset: int, reason: str) -> None:
        record = MemoryRecord(offset, 0, b"secret", b"secret", ())
        letters.encode(3, record, reason, "it says secret")

    for offset in range(50):
        reject(offset, "currency")
    reject(50, "amount")
    now_ms[0] = LOG_EVERY_MS
    reject(51, "currency")

    told = [vars(line) for line in caplog.records]
    assert [(line["reason"], line["records"], line["offset"]) for line in told] == [
        ("currency", 1, 0),
        ("amount", 1, 50),
        ("currency", 50, 51),
    ]
    assert "secret" not in str(told)


@pytest.mark.parametrize(
    ("key_bytes", "value_bytes", "truncated"),
    [(10, 100, False), (10, 101, True), (101, 10, True), (1000, 1_000_000, True)],
)
def test_what_is_too_long_for_dead_letter_is_truncated_and_marked(
    key_bytes: int, value_bytes: int, truncated: bool
) -> None:
    world = World(topic_partitions=1, dead_letter_value_max_bytes=100)
    world.produce_raw(b"k" * key_bytes, b"v" * value_bytes)

    read_on(world)

    (record,) = world.kafka.records("dead-letter")
    assert record.key == b"k" * min(key_bytes, 100)
    assert record.value == b"v" * min(value_bytes, 100)
    assert dict(record.headers).get("truncated") == (
        str(value_bytes).encode() if truncated else None
    )


def test_the_longest_dead_letter_fits_the_brokers_default_limit() -> None:
    world = World(topic_partitions=1, dead_letter_value_max_bytes=900_000)
    world.produce_raw(b"k" * 500_000, b"v" * 1_000_000)

    read_on(world)

    (record,) = world.kafka.records("dead-letter")
    headers = sum(len(name) + len(value) for name, value in record.headers)
    assert len(record.key or b"") + len(record.value or b"") + headers < 1_000_000


def test_rejected_records_alone_advance_the_watermark() -> None:
    world = World(topic_partitions=1)
    for _ in range(5):
        world.produce_raw(b"A", b"junk")
    worker = world.worker()

    poll = one_poll(worker)

    assert poll.applied == {0: 5}
    assert world.watermark(0) == 5
    assert worker.count("recur_transactions_total") == 0


def test_rejected_records_of_what_was_applied_are_not_sent_again() -> None:
    world = World(topic_partitions=1)
    for _ in range(5):
        world.produce_raw(b"A", b"junk")
    read_on(world)
    world.kafka.join("recur", "transactions", 0)
    world.kafka._committed.clear()

    worker = read_on(world)

    assert len(world.kafka.records("dead-letter")) == 5
    assert worker.count("recur_records_skipped_total", reason="applied") == 5


class Brittle(Checkpoint):
    """Its computation fails for :data:`POISON`."""

    def __init__(self) -> None:
        sound = small_checkpoint()
        super().__init__(sound.network, sound.header)

    def encode(self, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if (raw[:, 0] == POISON).any():
            raise FloatingPointError("it fails")
        return super().encode(raw)


def test_a_transaction_that_makes_the_computation_fail_is_rejected_alone() -> None:
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


def test_when_everything_fails_the_worker_ends_with_nothing_published() -> None:
    world = World(topic_partitions=1, micro_batch_max=100)
    for _ in range(FAILURES_IN_A_ROW_MAX + 1):
        world.produce("A", amount=POISON)

    with pytest.raises(ScorerBrokenError):
        finish(world.worker(checkpoint=Brittle()).run())

    assert not world.dead_letters()
    assert not world.scores(0)
    assert world.watermark(0) == 0


# repeats, warming up, expiry -------------------------------------------------------------


def test_a_repeated_transaction_id_is_dropped_and_counted_and_says_nothing() -> None:
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


def test_a_warm_transaction_is_scored_and_raises_no_alert() -> None:
    world = World(topic_partitions=1, review_threshold=0.0)
    world.produce("A", headers=[(WARM_HEADER, b"")])
    world.produce("A", headers=[("other", b"1"), (WARM_HEADER, b"1")])
    world.produce("A", headers=[("other", b"1")])

    read_on(world)

    assert sorted(world.scores(0)) == [0, 1, 2]
    assert world.alerts().keys() == {"transactions:0:2"}


def test_states_are_counted_by_what_came_back() -> None:
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
        for result in ("cached", "loaded", "missing", "refused", "expired"):
            counts[result] += int(worker.count("recur_states_total", result=result))
    assert counts == {"cached": 2, "loaded": 2, "missing": 3, "refused": 1, "expired": 1}


def test_scores_of_an_account_whose_state_was_refused_say_so_and_no_others() -> None:
    """Also beside repeats, rejects, kept scores and another partition, and in the alerts."""
    world = World(topic_partitions=2, review_threshold=0.0, decline_threshold=1.0)
    a, b, c = world.account_in(0), world.account_in(0, 1), world.account_in(1)

    def produce(*names: str) -> list[str]:
        return [f"{world.topic}:{p}:{offset}" for p, offset in map(world.produce, names)]

    def marked(records: Iterator[bytes | None]) -> set[str]:
        found = [decode_score(value or b"") for value in records]
        assert {score.state for score in found} <= {None, "refused"}
        return {score.source for score in found if score.state == "refused"}

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
    assert worker.count("recur_states_total", result="refused") == 2

    produce(a, b, c)
    finish(worker.run())
    assert len(marked(record.value for record in world.kafka.records("alerts"))) == 3


def test_states_held_in_memory_are_bounded_and_none_that_is_unsaved_is_dropped() -> None:
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


def test_an_account_silent_too_long_starts_anew_also_in_a_replay() -> None:
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


# health ----------------------------------------------------------------------------------


def test_only_a_poll_that_was_applied_counts_as_movement() -> None:
    """A worker that drops poll after poll is stalled, and its watchdog must see that."""
    world = World(topic_partitions=1)
    world.produce_many(20)
    worker = world.worker()
    moves: list[bool] = []
    worker.health.moved = lambda *_: moves.append(True)  # type: ignore[method-assign]

    one_poll(worker)
    assert moves == [True]

    world.store.watermarks.clear()
    one_poll(worker)
    assert moves == [True]


@pytest.mark.parametrize(
    ("review", "decline", "expected"),
    [
        (None, None, (0.3, 0.6)),
        (0.1, None, (0.1, 0.6)),
        (0.8, None, (0.8, 0.8)),
        (None, 0.9, (0.3, 0.9)),
        (None, 0.2, (0.2, 0.2)),
        (0.1, 0.2, (0.1, 0.2)),
    ],
)
def test_threshold_settings_replace_the_checkpoints(
    review: float | None, decline: float | None, expected: tuple[float, float]
) -> None:
    settings = load_settings(review_threshold=review, decline_threshold=decline)

    thresholds = thresholds_of(settings, small_checkpoint().header.thresholds)

    assert (thresholds.review, thresholds.decline) == expected
