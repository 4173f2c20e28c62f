"""Labels with a broker and store in memory: each is recorded once or rejected with a reason."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from model.features.merchant import BUCKET_MS
from pipeline.errors import RejectedError, StartupError
from pipeline.messages.decoding import REASONS
from pipeline.messages.labels import Label, decode_label, encode_label
from pipeline.scoring import retry as patience_module
from pipeline.scoring import topic_id_cache
from pipeline.scoring.health import Health
from pipeline.scoring.labels import LabelProcessor
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.retry import Retrier
from pipeline.storage.merchant_profile import Fraud, transaction_hash
from pipeline.storage.transaction_note import ScoredNote
from tests.fakes.memory import MemoryConsumer, MemoryProducer, MemoryScoreLog
from tests.fakes.memory_workers import DAY_MS, START_MS, Killed, World, finish

# as JSON ---------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "transaction_id": "t1",
    "account_id": "secret-account",
    "merchant_id": "M1",
    "label": "fraud",
    "timestamp": START_MS,
    "labelled_at": "2024-05-31T18:00:00Z",
    "source": "chargeback",
}


def reason_of(value: bytes | None, key: bytes | None = b"M1") -> str:
    with pytest.raises(RejectedError) as caught:
        decode_label(key, value)
    assert caught.value.reason in REASONS
    assert "secret" not in str(caught.value)
    return caught.value.reason


def test_a_valid_label_is_decoded_with_both_its_times() -> None:
    label, timestamp_ms, labelled_ms = decode_label(b"M1", json.dumps(GOOD).encode())

    assert (label.transaction_id, label.label, label.source) == ("t1", "fraud", "chargeback")
    assert (timestamp_ms, labelled_ms) == (START_MS, 1_717_178_400_000)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": "secret"}, "label"),
        ({"label": None}, "wrong_type"),
        ({"label": 1}, "wrong_type"),
        ({"transaction_id": ""}, "id"),
        ({"merchant_id": "x" * 257}, "id"),
        ({"timestamp": "yesterday"}, "timestamp"),
        ({"timestamp": "1969-12-31T00:00:00Z"}, "timestamp"),
        ({"labelled_at": "2024-05-31T18:00:00"}, "labelled_at"),
        ({"labelled_at": START_MS - 1}, "labelled_at"),
        ({"account_id": 7}, "wrong_type"),
        ({"merchant_weight": 1.01}, "merchant_weight"),
        ({"merchant_weight": -0.5}, "merchant_weight"),
        ({"merchant_weight": "all"}, "wrong_type"),
    ],
)
def test_each_kind_of_invalid_label_is_rejected_with_its_reason(
    changes: dict[str, Any], reason: str
) -> None:
    value = json.dumps(GOOD | changes).encode()
    assert reason_of(value, str((GOOD | changes)["merchant_id"]).encode()) == reason


@pytest.mark.parametrize("missing", sorted(GOOD.keys() - {"source"}))
def test_a_label_without_a_field_is_rejected(missing: str) -> None:
    value = {name: value for name, value in GOOD.items() if name != missing}
    assert reason_of(json.dumps(value).encode()) == "missing_field"


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        (None, b"M1", "null_value"),
        (b"{", b"M1", "not_json"),
        (b"[1]", b"M1", "wrong_type"),
        (b" " * 70_000, b"M1", "too_large"),
        (json.dumps(GOOD).encode(), b"M2", "key_mismatch"),
        (json.dumps(GOOD).encode(), None, "key_mismatch"),
    ],
)
def test_a_record_that_is_no_label_is_rejected(
    value: bytes | None, key: bytes | None, reason: str
) -> None:
    assert reason_of(value, key) == reason


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_rejected(value: bytes) -> None:
    with pytest.raises(RejectedError):
        decode_label(b"M1", value)


@given(st.sampled_from(sorted(GOOD)), st.recursive(st.none() | st.text() | st.integers(), st.lists))
def test_random_json_in_a_field_never_raises_anything_but_rejected(field: str, value: Any) -> None:
    with contextlib.suppress(RejectedError):
        decode_label(b"M1", msgspec.json.encode(GOOD | {field: value}))


# recorded --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Retrier repeat at once: these tests have no event loop that could wait."""
    monkeypatch.setattr(patience_module, "RETRY_SECONDS", (0,))


class LabelWorker:
    """The worker's label processing: the real processor on fakes."""

    def __init__(self, world: World) -> None:
        self.metrics = Metrics(CollectorRegistry())
        self.health = Health(10.0, clock=lambda: 0.0)
        self.consumer = MemoryConsumer(world.kafka, world.settings, world.partitions, "labels")
        self.labels = LabelProcessor(
            settings=world.settings,
            store=world.merchants,
            publisher=MemoryProducer(world.kafka, world.settings),
            logs=MemoryScoreLog(world.kafka, world.settings),
            consumer=self.consumer,
            retrier=Retrier(self.metrics, self.health),
            metrics=self.metrics,
            health=self.health,
            clock_ms=lambda: world.now_ms,
        )
        self.labels.assign(world.partitions)

    def run(self, *, commit: bool = True) -> None:
        """Process the log to its end."""
        while poll := self.consumer.poll():
            finish(self.labels.process(poll))
            if commit:
                self.consumer.commit(poll)

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def produce_label(
    world: World, transaction: str, merchant: str = "M1", label: Any = "fraud", days: float = 7.0
) -> None:
    value = Label(
        transaction_id=transaction,
        account_id="A1",
        merchant_id=merchant,
        label=label,
        timestamp=START_MS - 10 * DAY_MS,
        labelled_at=START_MS - 10 * DAY_MS + round(days * DAY_MS),
    )
    world.kafka.produce(world.settings.topic("labels"), merchant.encode(), encode_label(value))


def known(world: World, merchant: str = "M1") -> list[str]:
    """Return the known frauds of a merchant among t0 to t99."""
    name_of = {transaction_hash(f"t{i}"): f"t{i}" for i in range(100)}
    return [name_of[fraud.id_hash] for fraud in world.merchants.profile(merchant).frauds]


def test_labels_are_recorded_and_rejected_ones_become_dead_letters() -> None:
    world = World()
    finish(world.merchants.add({}, [ScoredNote("M1", transaction_hash("t1"), "decline")]))
    produce_label(world, "t1")
    produce_label(world, "t2", "M2", days=3.0)
    produce_label(world, "t3", "M2", "legitimate")
    world.kafka.produce(world.settings.topic("labels"), b"M1", b"not a label")
    produce_label(world, "t4", days=30.0)  # known in twenty days
    worker = LabelWorker(world)

    worker.run()

    bucket = (START_MS - 10 * DAY_MS) // BUCKET_MS
    (fraud,) = world.merchants.profile("M1").frauds
    assert fraud == Fraud(transaction_hash("t1"), bucket, bucket + 7 * DAY_MS // BUCKET_MS)
    assert known(world, "M2") == ["t2"]
    assert sorted(reason for _, _, reason in world.dead_letters()) == [
        "future_timestamp",
        "not_json",
    ]
    assert worker.count("recur_labels_total", label="fraud", decision="decline") == 1
    assert worker.count("recur_labels_total", label="fraud", decision="approve") == 1
    assert worker.count("recur_labels_total", label="legitimate", decision="approve") == 1
    assert worker.count("recur_label_delay_seconds_sum") == pytest.approx((7 + 3 + 7) * 86_400)
    ends = {
        p: world.kafka.bounds(world.settings.topic("labels"), p).end
        for p in world.partitions
        if world.kafka.bounds(world.settings.topic("labels"), p).end
    }
    assert worker.labels.next_offsets() == ends


def test_an_older_label_that_comes_later_changes_nothing_and_counts_as_stale() -> None:
    """This happens when a file of last month follows one of this week, or a sender is slow."""
    world = World(topic_partitions=1)
    produce_label(world, "t1", days=8.0)
    produce_label(world, "t1", label="legitimate", days=7.0)
    produce_label(world, "t2", label="legitimate", days=8.0)
    produce_label(world, "t2", days=7.0)
    produce_label(world, "t3", days=7.0)
    produce_label(world, "t3", label="legitimate", days=7.0)  # the later one of the same time
    worker = LabelWorker(world)

    worker.run()

    assert known(world) == ["t1"]
    assert worker.count("recur_labels_stale_total") == 2
    assert worker.count("recur_duplicate_labels_total") == 0
    assert worker.count("recur_labels_total", label="fraud", decision="approve") == 2
    assert worker.count("recur_labels_total", label="legitimate", decision="approve") == 2
    lost(world)
    finish(worker.labels.look())
    worker.run()
    assert known(world) == ["t1"]


def test_a_label_after_60_days_does_not_count_its_transaction_as_approved() -> None:
    """The decision is unknown by then, unless the note still exists."""
    world = World(topic_partitions=1)
    finish(world.merchants.add({}, [ScoredNote("M1", transaction_hash("t1"), "decline")]))
    world.now_ms += 100 * DAY_MS
    for transaction, days in (("t1", 61.0), ("t2", 61.0), ("t3", 59.0)):
        produce_label(world, transaction, days=days)
    worker = LabelWorker(world)

    worker.run()

    counted = {
        decision: worker.count("recur_labels_total", label="fraud", decision=decision)
        for decision in ("approve", "review", "decline", "unknown")
    }
    assert counted == {"approve": 1, "review": 0, "decline": 1, "unknown": 1}


def test_a_label_may_give_the_merchant_weight() -> None:
    world = World(topic_partitions=1)
    for number, weight in enumerate((0, 0.25, 1, None)):
        fields = GOOD | {"transaction_id": f"t{number}", "labelled_at": START_MS}
        value = fields if weight is None else fields | {"merchant_weight": weight}
        world.kafka.produce(
            world.settings.topic("labels"), b"M1", json.dumps(value).encode(), headers=[]
        )
    LabelWorker(world).run()

    assert [fraud.weight for fraud in world.merchants.profile("M1").frauds] == [0, 64, 255, 255]


@pytest.mark.parametrize(
    ("labelled_at", "paid_at", "rejected"),
    [
        ("2024-05-31T00:00:00Z", "2024-05-31T18:00:00Z", False),
        ("2024-05-31T00:00:00+02:00", "2024-05-31T21:30:00Z", False),
        (1_717_113_600_000, "2024-05-31T18:00:00Z", False),
        ("2024-05-31T00:00:00Z", "2024-06-01T00:00:01Z", True),
        ("2024-05-31T12:00:00Z", "2024-05-31T18:00:00Z", True),
    ],
)
def test_a_date_without_a_time_is_not_before_the_payment_of_that_day(
    labelled_at: Any, paid_at: str, rejected: bool
) -> None:
    value = json.dumps(GOOD | {"labelled_at": labelled_at, "timestamp": paid_at}).encode()
    if rejected:
        assert reason_of(value) == "labelled_at"
    else:
        _, timestamp_ms, labelled_ms = decode_label(b"M1", value)
        assert timestamp_ms == labelled_ms


def test_redelivered_labels_are_recorded_and_counted_once() -> None:
    """Causes are a worker that dies before its commit, a rebalance, a zombie."""
    world = World(topic_partitions=1)
    for i in range(20):
        produce_label(world, f"t{i % 16}", f"M{i % 2}", "legitimate" if i >= 16 else "fraud")
    LabelWorker(world).run(commit=False)
    profiles = dict(world.merchants.profiles)

    again = LabelWorker(world)
    again.run()

    assert world.merchants.profiles == profiles
    assert again.count("recur_duplicate_labels_total") == 20
    assert again.count("recur_labels_total", label="fraud", decision="approve") == 0
    assert len(known(world, "M0") + known(world, "M1")) == 12


def die() -> None:
    raise Killed


@pytest.mark.parametrize("number", range(10))
def test_a_worker_may_die_at_any_step(number: int) -> None:
    world = World(topic_partitions=2, micro_batch_max=4)
    topic = world.settings.topic("labels")
    for i in range(10):
        produce_label(world, f"t{i}", f"M{i % 3}")
        if i % 4 == 1:
            produce_label(world, f"t{i}", f"M{i % 3}", "legitimate")
    world.kafka.produce(topic, b"M1", b"not a label")
    steps = iter(range(number + 1))

    def interrupt(name: str) -> None:
        if next(steps, None) == number:
            die()

    world.interrupt(interrupt)
    with pytest.raises(Killed):
        LabelWorker(world).run()
    world.interrupt(lambda name: None)
    LabelWorker(world).run()

    expected = [i for i in range(10) if i % 4 != 1]
    for merchant in range(3):
        wanted = [f"t{i}" for i in expected if i % 3 == merchant]
        assert sorted(known(world, f"M{merchant}")) == wanted
    assert {reason for _, _, reason in world.dead_letters()} == {"not_json"}


def test_a_label_worker_waits_for_redis() -> None:
    world = World(topic_partitions=1)
    produce_label(world, "t1")
    worker = LabelWorker(world)
    world.merchants.is_up = False
    poll = worker.consumer.poll()
    assert poll is not None
    work = worker.labels.process(poll)
    for _ in range(20):
        work.send(None)
    assert poll.applied == {}
    assert "redis" in worker.health.missing()
    world.merchants.is_up = True
    finish(work)
    assert poll.applied == {0: 1}
    assert known(world) == ["t1"]


def lost(world: World) -> None:
    world.merchants.profiles.clear()
    world.merchants.notes.clear()
    world.merchants.recorded.clear()


def test_lost_labels_are_recorded_again_from_the_start_of_the_log() -> None:
    world = World(topic_partitions=1)
    produce_label(world, "t1")
    produce_label(world, "t2")
    LabelWorker(world).run()
    lost(world)
    produce_label(world, "t3")

    LabelWorker(world).run()

    assert known(world) == ["t1", "t2", "t3"]


def test_labels_lost_meanwhile_are_recorded_again_by_the_same_worker() -> None:
    """Redis lost the labels since its snapshot; new labels may come or not."""
    world = World(topic_partitions=1)
    worker = LabelWorker(world)
    produce_label(world, "t1")
    worker.run()
    profiles, booked = dict(world.merchants.profiles), dict(world.merchants.recorded)
    for transaction in ("t2", "t3"):
        produce_label(world, transaction)
    worker.run()

    world.merchants.profiles, world.merchants.recorded = dict(profiles), dict(booked)
    produce_label(world, "t4")
    worker.run()
    assert known(world) == ["t1", "t2", "t3", "t4"]

    world.merchants.profiles, world.merchants.recorded = dict(profiles), dict(booked)
    finish(worker.labels.look())
    worker.run()
    assert known(world) == ["t1", "t2", "t3", "t4"]

    finish(worker.labels.look())
    assert worker.consumer.poll() is None

    world.merchants.profiles, world.merchants.recorded = dict(profiles), dict(booked)
    other = LabelWorker(world)  # it got no label yet
    finish(other.labels.look())
    other.run()
    assert known(world) == ["t1", "t2", "t3", "t4"]


def test_labels_fetched_before_the_log_is_read_back_are_not_recorded() -> None:
    """If recorded, they would count earlier labels as recorded, too, and these would stay lost."""
    world = World(topic_partitions=1, micro_batch_max=1)
    produce_label(world, "t1")
    produce_label(world, "t2")
    LabelWorker(world).run()
    lost(world)
    produce_label(world, "t3")
    produce_label(world, "t4")
    worker = LabelWorker(world)
    fetched = [worker.consumer.poll(), worker.consumer.poll()]

    for poll in fetched:
        assert poll is not None
        finish(worker.labels.process(poll))
        assert poll.applied == {}
    worker.run()

    assert known(world) == ["t1", "t2", "t3", "t4"]


def test_a_log_whose_first_records_are_deleted_is_read_from_its_start() -> None:
    world = World(topic_partitions=1)
    for i in range(4):
        produce_label(world, f"t{i}")
    world.kafka.delete_records(world.settings.topic("labels"), 0, 2)

    LabelWorker(world).run()

    assert known(world) == ["t2", "t3"]


def test_a_poll_that_outlives_its_assignment_does_not_affect_the_next_one() -> None:
    """Otherwise the first labels of the next assignment would be skipped for ever."""
    world = World(topic_partitions=1, micro_batch_max=1)
    for i in range(3):
        produce_label(world, f"t{i}")
    worker = LabelWorker(world)
    late = worker.consumer.poll()
    assert late is not None

    def take_and_give(name: str) -> None:
        if name == "after record labels":
            world.interrupt(lambda name: None)
            other = LabelWorker(world)
            other.run()
            worker.labels.assign(world.partitions)

    world.interrupt(take_and_give)
    finish(worker.labels.process(late))

    assert late.applied == {}
    assert worker.labels.next_offsets() == {}


def test_a_partition_revoked_meanwhile_is_not_acked() -> None:
    world = World(topic_partitions=1)
    produce_label(world, "t1")
    worker = LabelWorker(world)

    def revoke(name: str) -> None:
        if name == "after record labels":
            worker.labels.assign(())

    world.interrupt(revoke)
    poll = worker.consumer.poll()
    assert poll is not None
    finish(worker.labels.process(poll))

    assert poll.applied == {}
    assert worker.labels.assigned() == set()


@pytest.mark.parametrize("count", [2, 10, 15], ids=["shorter", "as long", "longer"])
@pytest.mark.parametrize("runs_on", [True, False])
def test_labels_of_a_recreated_topic_are_recorded_or_the_worker_stops(
    count: int, runs_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They never count as the earlier labels with the same offsets."""
    monkeypatch.setattr(topic_id_cache, "MAX_AGE_SECONDS", 0.0)
    for policy in ("stop", "begin"):
        world = World(topic_partitions=1, on_new_log=policy)
        for i in range(10):
            produce_label(world, f"t{i}")
        before = LabelWorker(world)
        before.run()
        world.kafka.recreate(world.settings.topic("labels"))
        for i in range(count):
            produce_label(world, f"t{50 + i}")
        worker = before if runs_on else LabelWorker(world)

        def go_on(worker: LabelWorker) -> None:
            worker.run()
            finish(worker.labels.look())  # a check without new labels
            worker.run()

        if policy == "stop":
            with pytest.raises(
                StartupError, match=r"recorded labels .* an earlier labels.*--new-log"
            ):
                go_on(worker)
            assert known(world) == [f"t{i}" for i in range(10)]
            continue
        go_on(worker)
        assert set(known(world)) == {*(f"t{i}" for i in range(10))} | {
            f"t{50 + i}" for i in range(count)
        }
        assert finish(world.merchants.recorded_to(0)) == count
