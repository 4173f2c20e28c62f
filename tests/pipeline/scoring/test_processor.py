"""A run of the processor without faults: order of the steps, scores, alerts, metrics."""

from __future__ import annotations

import numpy as np
import pytest

from model.features.spec import FEATURES
from model.reasons import REASONS_MAX
from model.stepper import sigmoid
from pipeline.messages.decision import DecisionThresholds, thresholds_of
from pipeline.messages.scores import decode_alert, decode_score
from pipeline.settings import load_settings
from tests.fakes.memory_workers import (
    World,
    finish,
    small_checkpoint,
)
from tests.pipeline.scoring.helpers import one_poll, read_on

pytestmark = pytest.mark.usefixtures("no_waits")


def test_the_steps_of_a_poll_run_in_order() -> None:
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
    names += ["add to merchants", "save"]  # notes are written before the states
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
    for name in ("scores_recovered", "watermark_conflicts", "zombie_scores", "records_lost"):
        assert worker.count(f"recur_{name}_total") == 0
    assert worker.count("recur_records_skipped_total", reason="applied") == 0
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


def test_a_score_has_all_documented_fields_and_can_be_recomputed() -> None:
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
    stepper = world.checkpoint.stepper
    logits, _ = stepper.step(world.checkpoint.encode(raw), stepper.empty_hidden(1))
    assert np.float32(score.score) == sigmoid(logits)[0], "cannot be recomputed"


def test_an_alert_has_its_score_thresholds_and_time() -> None:
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


def test_new_thresholds_apply_from_the_next_micro_batch_on() -> None:
    """Each alert names the thresholds of its decision."""
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


def test_only_an_applied_poll_counts_as_progress() -> None:
    """A worker that drops every poll is stalled, and its watchdog must notice."""
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
