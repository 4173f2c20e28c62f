"""Merchants in the worker: counted once, used only in closed buckets, equal after a crash."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from model.features.merchant import (
    BUCKET_MS,
    MERCHANT_FEATURES,
    SETTLE_MS,
    observe_merchants,
    present_bucket,
)
from model.features.spec import FEATURES, INPUTS
from pipeline.messages.scores import decode_score, stored_weight
from pipeline.scoring import retry as patience_module
from pipeline.scoring.merchant_features import MerchantFeatureCache
from pipeline.scoring.metrics import Metrics
from pipeline.storage.keys import merchant_slot
from pipeline.storage.merchant_profile import Fraud, Profile, decode_profiles, transaction_hash
from pipeline.storage.merchant_store import MerchantLabel
from pipeline.storage.transaction_note import TransactionNote
from tests.fakes.memory import MemoryMerchantStore
from tests.fakes.memory_workers import (
    DAY_MS,
    START_MS,
    Killed,
    World,
    checkpoint_of_weights,
    finish,
    small_checkpoint,
)

START_BUCKET = START_MS // BUCKET_MS


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience_module, "RETRY_SECONDS", (0,))


def world_with_merchants(**settings: Any) -> World:
    """A world whose checkpoint uses merchants' features."""
    return World(small_checkpoint(inputs=INPUTS), topic_partitions=1, **settings)


def total(world: World, merchant: str = "m1") -> int:
    return int(world.merchants.profile(merchant).counts.sum())


def features(world: World) -> list[dict[str, float]]:
    """Return a field of each published score, in log order."""
    scores = world.scores(0)
    found = [decode_score(scores[offset][0]) for offset in sorted(scores)]
    return [dict(zip(FEATURES, score.raw(FEATURES), strict=True)) for score in found]


def jump_to_next_bucket(world: World) -> None:
    world.now_ms = (world.now_ms // BUCKET_MS + 1) * BUCKET_MS + SETTLE_MS


# counts ----------------------------------------------------------------------------------


def test_each_new_transaction_is_counted_in_its_bucket_and_nothing_else_is() -> None:
    world = world_with_merchants()
    for i in range(30):
        world.produce(f"A{i % 5}", f"t{i}", merchant_id=f"m{i % 3}")
    sent_ms = world.now_ms - 3 * 60_000
    world.produce("A1", "t26", merchant_id="m2", timestamp=sent_ms)  # a duplicate
    world.produce_raw(b"A1", b"not a transaction")
    finish(world.worker().run())

    assert [total(world, f"m{i}") for i in range(3)] == [10, 10, 10]
    assert world.merchants.profile("m0").head == START_BUCKET


def test_a_replay_counts_nothing_again() -> None:
    world = world_with_merchants()
    for i in range(10):
        world.produce(f"A{i}")
    finish(world.worker().run())
    world.store.watermarks.clear()
    world.store.states.clear()
    world.produce("A1")

    finish(world.worker().run())

    assert total(world) == 11
    world.assert_published_before_saved()


@pytest.mark.parametrize("when", ["before save", "after save", "before add to merchants"])
def test_a_crash_changes_counts_by_no_more_than_its_micro_batch(when: str) -> None:
    world = world_with_merchants(micro_batch_max=4)
    for i in range(12):
        world.produce(f"A{i}")
    left = iter([None])

    def die(name: str) -> None:
        if name == when and next(left, 0) is None:
            raise Killed

    world.interrupt(die)
    with pytest.raises(Killed):
        finish(world.worker().run())
    world.interrupt(lambda name: None)
    finish(world.worker().run())

    assert abs(total(world) - 12) <= 4
    assert sum(len(said) for said in world.scores(0).values()) == 12


def test_a_shadow_model_counts_nothing() -> None:
    world = world_with_merchants(update_merchant_profiles=False, review_threshold=0.0)
    world.produce("A1")
    finish(world.worker().run())

    assert world.merchants.profiles == {}
    assert world.merchants.notes == {}


def test_notes_of_alerts_stand_under_the_hash_of_their_transaction() -> None:
    world = World(topic_partitions=1, review_threshold=0.0, decline_threshold=1.0)
    world.produce("A1", "t1")
    finish(world.worker().run())

    place = merchant_slot("m1"), transaction_hash("t1")
    assert world.merchants.notes == {place: TransactionNote("review")}


def world_of_weights(**settings: Any) -> World:
    """A network that gives payments of an unusual amount a low merchant weight."""
    return World(checkpoint_of_weights(), topic_partitions=1, **settings)


def test_a_merchant_weight_below_the_maximum_is_in_the_score_and_the_note() -> None:
    world = world_of_weights(review_threshold=1.0, decline_threshold=1.0)
    for i, amount in enumerate((50.0, 50.0, 50.0, 250.0, 4_000.0)):
        world.produce("A1", f"t{i}", amount=amount)
    worker = world.worker()
    finish(worker.run())

    scores = [decode_score(said[0]) for _, said in sorted(world.scores(0).items())]
    shares = [score.merchant_weight for score in scores]
    assert shares[:3] == [None] * 3
    assert shares[4] is not None
    assert shares[3] is None or shares[3] > shares[4]
    assert shares[4] < 0.1
    assert shares[3] is None or shares[3] > shares[4]
    place = merchant_slot("m1"), transaction_hash("t4")
    expected = TransactionNote(scores[4].decision, stored_weight(shares[4]))
    assert world.merchants.notes[place] == expected
    assert (place[0], transaction_hash("t0")) not in world.merchants.notes
    assert [score.out_of_range for score in scores] == [None] * 4 + [["amount"]]
    assert worker.count("recur_inputs_out_of_range_total", feature="amount") == 1
    assert worker.count("recur_inputs_out_of_range_total", feature="hour_of_day") == 0


def test_a_fraud_with_a_low_merchant_weight_hardly_counts_at_its_merchant() -> None:
    world = world_of_weights(review_threshold=1.0, decline_threshold=1.0)
    worker = world.worker()
    for merchant, amount in (("plain", 50.0), ("blamed", 4_000.0)):
        for i in range(4):
            world.produce(f"A-{merchant}", f"{merchant}{i}", amount=50.0, merchant_id=merchant)
        world.produce(f"A-{merchant}", f"f-{merchant}", amount=amount, merchant_id=merchant)
    finish(worker.run())
    bucket = world.now_ms // BUCKET_MS
    for merchant in ("plain", "blamed"):
        entry = Fraud(transaction_hash(f"f-{merchant}"), bucket, bucket)
        offset = world.merchants.all_recorded_to(0)
        booking = MerchantLabel(offset, merchant, True, entry)
        finish(world.merchants.record_labels(0, [booking], offset, offset + 1))
    jump_to_next_bucket(world)
    for merchant in ("plain", "blamed"):
        world.produce(f"B-{merchant}", merchant_id=merchant)
    finish(worker.run())

    plain, blamed = (f["merchant_known_frauds"] for f in features(world)[-2:])
    assert plain == 1.0
    assert 0.0 < blamed < 0.1


def test_notes_of_published_scores_survive_a_worker_that_dies_before_its_save() -> None:
    """The next owner finds the score and writes its note."""
    world = world_of_weights(review_threshold=0.0, decline_threshold=1.0)
    world.produce("A1", "t1", amount=50.0)
    world.produce("A1", "t2", amount=4_000.0)
    left = iter([None])

    def die(name: str) -> None:
        if name == "before add to merchants" and next(left, 0) is None:
            raise Killed

    world.interrupt(die)
    with pytest.raises(Killed):
        finish(world.worker().run())
    assert world.merchants.notes == {}
    assert world.watermark(0) == 0
    world.interrupt(lambda name: None)
    finish(world.worker().run())

    for number, said in enumerate(world.scores(0).values(), start=1):
        assert len(said) == 1
        note = world.merchants.notes[merchant_slot("m1"), transaction_hash(f"t{number}")]
        assert note.decision == decode_score(said[0]).decision
        assert (note.weight < 26) == (number == 2)


# features --------------------------------------------------------------------------------


def test_a_transaction_uses_closed_buckets_and_labels_that_came_in_closed_buckets() -> None:
    world = world_with_merchants()
    worker = world.worker()
    for account in ("A1", "A2"):
        world.produce(account, f"first-{account}")
    finish(worker.run())
    bucket = world.now_ms // BUCKET_MS
    entry = Fraud(transaction_hash("first-A1"), bucket, bucket + 1)
    jump_to_next_bucket(world)
    world.produce("A3")
    finish(worker.run())
    finish(world.merchants.record_labels(0, [MerchantLabel(0, "m1", True, entry)], 0, 1))
    world.produce("A4")
    finish(worker.run())
    jump_to_next_bucket(world)
    world.produce("A5")
    finish(worker.run())

    seen = [(f["merchant_count_1d"], f["merchant_known_frauds"]) for f in features(world)]
    assert seen == [(0, 0), (0, 0), (2, 0), (2, 0), (4, 1)]


def test_a_checkpoint_without_merchant_features_loads_and_counts_no_merchants() -> None:
    world = World(topic_partitions=1)
    steps: list[str] = []
    world.interrupt(steps.append)
    world.produce("A1")
    finish(world.worker().run())

    assert "before load merchants" not in steps
    assert total(world) == 0


def test_a_merchant_is_loaded_once_in_a_bucket() -> None:
    world = world_with_merchants(micro_batch_max=1)
    world.now_ms = START_BUCKET * BUCKET_MS + SETTLE_MS
    steps: list[str] = []
    world.interrupt(steps.append)
    worker = world.worker()
    for i in range(6):
        world.produce(f"A{i}")
    finish(worker.run())
    assert steps.count("before load merchants") == 1
    assert worker.count("recur_merchant_profiles_total", result="cached") == 5

    jump_to_next_bucket(world)
    world.produce("A7")
    finish(worker.run())
    assert steps.count("before load merchants") == 2


def test_a_published_score_advances_its_state_with_its_recorded_features() -> None:
    """The worker dies after publishing a score. The profile changes before the next owner comes."""
    world = world_with_merchants()
    worker = world.worker()
    world.produce("A0", "t0")
    finish(worker.run())
    world.produce("A1", "t1")
    left = iter([None])

    def die(name: str) -> None:
        if name == "before save" and next(left, 0) is None:
            raise Killed

    world.interrupt(die)
    with pytest.raises(Killed):
        finish(worker.run())
    world.interrupt(lambda name: None)
    undisturbed = world_with_merchants()
    undisturbed.produce("A0", "t0")
    undisturbed.produce("A1", "t1")
    finish(undisturbed.worker().run())

    entries = [Fraud(i, START_BUCKET - 40, START_BUCKET - 10) for i in range(9)]
    bookings = [MerchantLabel(i, "m1", True, entry) for i, entry in enumerate(entries)]
    finish(world.merchants.record_labels(0, bookings, 0, 9))
    finish(world.worker().run())

    assert len(world.scores(0)[1]) == 1
    assert world.store.states[0, "A1"] == undisturbed.store.states[0, "A1"]


def test_without_the_recorded_features_the_result_would_differ() -> None:
    """This is the assumption of the test above."""
    world = world_with_merchants()
    entries = [Fraud(i, START_BUCKET - 40, START_BUCKET - 10) for i in range(9)]
    bookings = [MerchantLabel(i, "m1", True, entry) for i, entry in enumerate(entries)]
    finish(world.merchants.record_labels(0, bookings, 0, 9))
    world.produce("A1", "t1")
    finish(world.worker().run())
    assert features(world)[0]["merchant_known_frauds"] == 9


# cached in memory ------------------------------------------------------------------------


@pytest.mark.parametrize("cached_max", [0, 1, 3, 7, 1000])
def test_cached_features_equal_loaded_ones(cached_max: int) -> None:
    """This holds for any order of buckets and merchants, and any size of the cache."""
    rng = np.random.default_rng(cached_max)
    store = MemoryMerchantStore()
    names = [f"m{i}" for i in range(10)]
    for name in names[:8]:
        profile = Profile()
        for bucket in range(START_BUCKET - 50, START_BUCKET + 10):
            profile.count(bucket, int(rng.integers(0, 5)))
        profile.record(Fraud(1, START_BUCKET - 40, START_BUCKET - int(rng.integers(5, 12))), True)
        store.profiles[name] = profile.to_bytes()
    store.profiles["m9"] = b"damaged"
    metrics = Metrics(CollectorRegistry())
    merchants = MerchantFeatureCache(
        metrics=metrics,
        label_delay_ms=7 * DAY_MS,
        size_max=cached_max,
    )

    async def go() -> None:
        for _ in range(60):
            n = int(rng.integers(1, 8))
            ids = [names[i] for i in rng.integers(0, 10, n)]
            times = START_MS + rng.integers(-2, 3, n) * BUCKET_MS
            wanted = merchants.look_up(ids, times)
            if wanted.merchant_ids:
                merchants.fill(wanted, await store.load(wanted.merchant_ids))
            profiles, _ = decode_profiles([store.profiles.get(name) for name in ids])
            expected = observe_merchants(profiles, np.arange(n), times, 7 * DAY_MS)
            np.testing.assert_array_equal(wanted.raw, expected)
            assert wanted.raw.shape == (n, len(MERCHANT_FEATURES))

    asyncio.run(go())
    assert present_bucket(np.array([START_MS])).item() in (START_BUCKET, START_BUCKET - 1)
